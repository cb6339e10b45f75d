"""Distilling a student: what training reports is what drafting with it does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_cases import VOCABULARY, alone, local, make_checkpoint

from shoal.engine.source import LocalModel
from shoal.engine.speculation.drafters import Drafters
from shoal.engine.speculation.eagle_training import Plan
from shoal.engine.speculation.student_training import StudentPupil, spread
from shoal.engine.speculation.writing import TargetText
from shoal.errors import ModelError
from shoal.learner import checkpoint as checkpoints
from shoal.learner.optimizer import MasterAdamW
from shoal.protocol.sampling import SamplingParams

STEPS = 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=5)


@pytest.fixture(scope="module")
def texts(deep: Path) -> list[TargetText]:
    stream = random.Random(1)
    prompts = [tuple(stream.choices(range(3, VOCABULARY), k=4 + n)) for n in range(6)]
    return [
        TargetText(n, prompt, alone(deep, prompt, max_tokens=14, temperature=0.0).token_ids)
        for n, prompt in enumerate(prompts)
    ]


def test_layers_are_left_out_evenly() -> None:
    assert spread(30, 3) == [0, 14, 29] and spread(30, 1) == [0] and spread(4, 3) == [0, 2, 3]


def test_a_student_learns_and_drafts_as_often_right_as_was_reported(
    deep: Path, texts: list[TargetText], tmp_path: Path
) -> None:
    pupil = StudentPupil(local(deep), 2, dtype="fp32", device="cpu", threads=1)
    frozen = pupil.module.get_input_embeddings().weight.detach().clone()
    plan = Plan(30, 4, 2, STEPS, lambda step: 3e-3, 0)
    optimizer = MasterAdamW(pupil.parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=0.5)
    before, _ = pupil.evaluate(texts, plan)
    reports = list(pupil.train(texts, plan, optimizer))
    after, accept = pupil.evaluate(texts, plan)
    assert len(reports) == 30 and after < before * 0.8
    assert torch.equal(frozen, pupil.module.get_input_embeddings().weight)
    checkpoints.save(tmp_path, checkpoints.Checkpoint(30, pupil.state(), optimizer.state_dict()))
    saved = checkpoints.load_latest(tmp_path)
    other = StudentPupil(local(deep), 2, dtype="fp32", device="cpu", threads=1)
    assert saved is not None
    other.restore(saved.weights)
    assert other.evaluate(texts, plan) == (after, accept), "it goes on from its checkpoint"
    with pytest.raises(RuntimeError):
        StudentPupil(local(deep), 1, dtype="fp32", device="cpu", threads=1).restore(saved.weights)
    folder = tmp_path / "student"
    pupil.save(folder)
    drafters = Drafters(LocalModel("student", folder), local(deep), torch.float32, torch.device("cpu"))
    right, asked = [0] * STEPS, [0] * STEPS
    greedy = SamplingParams(temperature=0.0)
    for text in texts:
        whole = [*text.prompt_ids, *text.token_ids]
        for at in range(len(text.prompt_ids), len(whole)):
            drafter = drafters.make(1, 256)
            drafter.begin(0, whole[:at], None)
            drafts = drafter.propose([STEPS], [greedy], torch.zeros(1, STEPS).double(), probs=False)
            for depth, (drafted, said) in enumerate(zip(drafts.tokens_BN[0].tolist(), whole[at:], strict=False)):
                asked[depth] += 1
                if drafted != said:
                    break
                right[depth] += 1
    assert accept == pytest.approx([r / max(1, a) for r, a in zip(right, asked, strict=True)], abs=0.03)


def test_a_student_is_smaller_than_its_target(deep: Path) -> None:
    with pytest.raises(ModelError, match="no smaller"):
        StudentPupil(local(deep), 5, dtype="fp32", device="cpu", threads=1)
