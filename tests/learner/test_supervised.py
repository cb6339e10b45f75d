"""Supervised fine-tuning: what is read, what is learnt, and that a run that was killed ends as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from shoal.config.learner import ColocatedLearner
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, StorageError
from shoal.learner.batch import Trajectory
from shoal.learner.examples import read_examples
from shoal.learner.loading import load_policy
from shoal.learner.supervised import Line, Plan, SupervisedTrainer, fine_tune
from shoal.protocol.chat import Message
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion
from tiny import make_tiny_model

TALK = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "4 and 5"},
]
SETTINGS = ColocatedLearner(lr=1e-2, device="cpu", microbatch_tokens=64)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel("tiny", make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tokenizer(local: LocalModel) -> Tokenizer:
    return Tokenizer(local.directory)


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return path


def read(path: Path, tokenizer: Tokenizer, max_tokens: int = 200, min_reward: float = 1.0) -> list[Trajectory]:
    return read_examples(path, tokenizer, max_tokens=max_tokens, min_reward=min_reward).items


def episode(reward: float) -> Episode:
    completion = Completion(token_ids=(9, 1), logprobs=(-1.0, -0.5), versions=(0, 0), finish="stop", text="x")
    return Episode(
        id=f"e{reward}",
        group="g1",
        index=0,
        task=Task(env="digit", id="train-0", seed=0),
        turns=(Turn(context_ids=(2, 7, 1, 3), observation="?", completion=completion),),
        outcome="done",
        reward=reward,
    )


def test_assistant_turns_are_learnt_with_the_token_that_ends_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (item,) = read(write(tmp_path / "talk.jsonl", {"messages": TALK}), tokenizer)
    prompt = tokenizer.prompt([Message(role="user", content="1?")])
    assert item.token_ids[: item.prefix_length].tolist() == prompt and not item.trained[: len(prompt)].any()
    learnt = item.token_ids[item.trained].tolist()
    end = tokenizer.end_of_turn
    assert end in tokenizer.end_ids
    assert learnt == [*tokenizer.encode("2"), end, *tokenizer.encode("4 and 5"), end]
    between = tokenizer.continuation([*tokenizer.encode("2"), end], "3?")
    assert item.token_ids.tolist() == [*prompt, *learnt[:2], *between, *learnt[2:]]


def test_prompt_and_completion_are_a_talk_of_one_turn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    short = write(tmp_path / "short.jsonl", {"prompt": "1?", "completion": "2"})
    long = write(tmp_path / "long.jsonl", {"messages": TALK[:2]})
    assert read(short, tokenizer)[0].token_ids.tolist() == read(long, tokenizer)[0].token_ids.tolist()


def test_episodes_are_learnt_as_drawn_where_they_earned_enough(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "episodes.jsonl", to_json(episode(1.0)), to_json(episode(0.4)))
    found = read_examples(path, tokenizer, max_tokens=100, min_reward=0.5)
    assert found.num_below_reward == 1 and len(found.items) == 1
    assert found.items[0].token_ids.tolist() == [2, 7, 1, 3, 9, 1]
    assert found.items[0].trained.tolist() == [False] * 4 + [True] * 2


def test_what_was_drawn_at_temperature_0_can_be_learnt_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    greedy = replace(episode(1.0), temperature=0.0)
    (item,) = read(write(tmp_path / "episodes.jsonl", to_json(greedy)), tokenizer)
    assert item.temperature == 1.0 and item.num_trained == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "line 2 is not JSON"),
        ({"text": "x"}, 'line 2 has neither "messages"'),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: each message needs a role"),
        ({"messages": TALK[:1]}, "the assistant speaks last"),
        ({"messages": TALK[1:]}, "take turns"),
        ({"messages": [*TALK, TALK[1]]}, "take turns"),
        ({"turns": 3}, "line 2 is no episode"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: Any, problem: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"messages": TALK}, line)
    with pytest.raises(ConfigError, match=problem):
        read(path, tokenizer)


def test_nothing_to_learn_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="1 lines are longer than 5 tokens"):
        read(write(tmp_path / "long.jsonl", {"messages": TALK}), tokenizer, max_tokens=5)
    with pytest.raises(StorageError, match="cannot be read"):
        read(tmp_path / "absent.jsonl", tokenizer)


def test_loss_and_gradients_are_those_of_transformers(tmp_path: Path, local: LocalModel, tokenizer: Tokenizer) -> None:
    lines = [{"messages": TALK}, {"prompt": "7?", "completion": "8"}, {"prompt": "7?", "completion": "9 or 0"}]
    items = read(write(tmp_path / "talk.jsonl", *lines), tokenizer)
    trainer = SupervisedTrainer(load_policy(local, "fp32", "cpu"), SETTINGS)
    total = sum(item.num_trained for item in items)
    # Measured before the optimizer takes the gradients away.
    loss = sum(
        (trainer._loss(micro, trainer.given(items).denominators).loss for micro in trainer.given(items).micro_batches),
        start=torch.zeros(()),
    )
    loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(local.directory, dtype=torch.float32)
    expected = torch.zeros(())
    for item in items:
        labels = torch.from_numpy(np.where(item.trained, item.token_ids, -100))[None]
        ids = torch.from_numpy(item.token_ids)[None]
        expected = expected + plain(input_ids=ids, labels=labels).loss * item.num_trained / total
    expected.backward()
    assert torch.isclose(loss, expected, rtol=1e-5)
    assert trainer.nll(items) == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in trainer.trainable().items():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def learn(local: LocalModel, items: Sequence[Trajectory], directory: Path, epochs: int) -> tuple[Any, list[Line]]:
    lines: list[Line] = []
    trainer = fine_tune(
        load_policy(local, "fp32", "cpu"),
        SETTINGS,
        Plan(epochs=epochs, batch_size=2, seed=3, checkpoint_every=1),
        items[:-1],
        items[-1:],
        directory,
        lines.append,
        lambda step: lines.append({"kind": "resume", "step": step}),
    )
    return trainer.tensors(), lines


def test_what_is_shown_is_learnt_and_a_killed_run_ends_alike(
    tmp_path: Path, local: LocalModel, tokenizer: Tokenizer
) -> None:
    lines = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(6)]
    items = read(write(tmp_path / "echo.jsonl", *lines), tokenizer)
    whole, said = learn(local, items, tmp_path / "whole", epochs=6)
    steps = [line for line in said if line["kind"] == "step"]
    evals = [line["nll"] for line in said if line["kind"] == "eval"]
    assert [line["step"] for line in steps] == list(range(1, 19)) and len(evals) == 7
    assert float(steps[-1]["loss"]) < 0.5 * float(steps[0]["loss"]) and float(evals[-1]) < float(evals[0])

    class Killed(Exception):
        pass

    def stop(line: Line) -> None:
        if line["kind"] == "step" and line["step"] == 8:
            raise Killed

    plan = Plan(epochs=6, batch_size=2, seed=3, checkpoint_every=3)
    with pytest.raises(Killed):
        fine_tune(
            load_policy(local, "fp32", "cpu"), SETTINGS, plan, items[:-1], items[-1:], tmp_path / "cut", stop, print
        )
    resumed, after = learn(local, items, tmp_path / "cut", epochs=6)
    assert after[0] == {"kind": "resume", "step": 6}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
