"""EAGLE heads: the public layout is read and written, others are refused; training imitates drafting exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import VOCABULARY, alone, local, make_decoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.engine.speculation.eagle import feature_depths
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import LoadedHead, head_config, load_head, new_head, save_head
from shoal.engine.speculation.eagle_training import (
    Plan,
    Teacher,
    batch_of,
    evaluate,
    frequent_ids,
    train,
    unroll,
)
from shoal.engine.speculation.writing import TargetText
from shoal.errors import ModelError
from shoal.protocol.sampling import SamplingParams

REDUCED = 96
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def head_files(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head as the public ones lie on disk, made by hand rather than by `save_head`."""
    directory = tmp_path_factory.mktemp("public")
    config = head_config(local(plain).config(), REDUCED)
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], 24
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    ids = torch.randperm(VOCABULARY, generator=generator)[:REDUCED].sort().values
    tensors = {
        "fc.weight": made(hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": made(hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": made(kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": made(kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": made(hidden, hidden),
        "midlayer.mlp.gate_proj.weight": made(inner, hidden),
        "midlayer.mlp.up_proj.weight": made(inner, hidden),
        "midlayer.mlp.down_proj.weight": made(hidden, inner),
        "midlayer.hidden_norm.weight": made(hidden),
        "midlayer.input_layernorm.weight": made(hidden),
        "midlayer.post_attention_layernorm.weight": made(hidden),
        "norm.weight": made(hidden),
        "lm_head.weight": made(REDUCED, hidden),
        "d2t": ids - torch.arange(REDUCED),
        "t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True),
    }
    save_file(tensors, directory / "model.safetensors")
    # The public configurations are older than `rope_parameters`.
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 10_000.0}
    (directory / "config.json").write_text(json.dumps(old))
    return directory


def read(directory: Path, plain: Path) -> LoadedHead:
    return load_head(directory, local(plain), torch.float32, CPU)


def test_a_public_head_is_read_and_written_back(head_files: Path, plain: Path, tmp_path: Path) -> None:
    loaded = read(head_files, plain)
    assert loaded.depths == feature_depths(2) and loaded.embedding_VH.shape == (VOCABULARY, 48)
    own = load_file(head_files / "model.safetensors")
    assert torch.equal(loaded.head.q_proj.weight, own["midlayer.self_attn.q_proj.weight"])
    assert torch.equal(loaded.head.ids_R, own["t2d"].nonzero()[:, 0])
    save_head(loaded.head, json.loads((head_files / "config.json").read_text()), tmp_path, torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)


def test_other_names_of_the_same_tensors_and_an_own_embedding(head_files: Path, plain: Path, tmp_path: Path) -> None:
    own = load_file(head_files / "model.safetensors")
    renamed = {"model." + name.replace("midlayer.", "layers.0."): tensor for name, tensor in own.items()}
    embedding = torch.randn(VOCABULARY, 48)
    save_file(renamed | {"embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((head_files / "config.json").read_text())
    loaded = read(tmp_path, plain)
    assert torch.equal(loaded.embedding_VH, embedding) and torch.equal(loaded.head.norm, own["norm.weight"])


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "map", "vocabulary", "pickled"])
def test_what_is_no_head_of_this_target_is_refused(fault: str, head_files: Path, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(head_files / "model.safetensors")
    config: dict[str, Any] = json.loads((head_files / "config.json").read_text())
    match fault:
        case "missing":
            del tensors["fc.weight"]
        case "unknown":
            tensors["midlayer.self_attn.q_proj.bias"] = torch.zeros(48)
        case "shape":
            tensors["fc.weight"] = torch.zeros(48, 48)
        case "map":
            tensors["d2t"] = tensors["d2t"] + VOCABULARY
        case "vocabulary":
            config["vocab_size"] = VOCABULARY + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    if fault == "pickled":
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError):
        read(tmp_path, plain)


def test_depths_are_those_of_the_paper_where_the_model_has_them() -> None:
    assert feature_depths(32) == (2, 16, 29) and feature_depths(30) == (2, 15, 27)
    for layers in range(2, 8):
        assert all(1 <= depth < layers for depth in feature_depths(layers))


class Plainly:
    """Adam, as the interface wants it."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._adam = torch.optim.Adam(parameters, lr=1.0)

    def accumulate(self) -> None:
        pass

    def step(self, lr: float) -> None:
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        self._adam.zero_grad()


def test_a_head_learns_and_the_training_time_test_is_what_drafting_does(plain: Path) -> None:
    """The accept counts of training, position by position and depth by depth, equal those of a real drafter that is
    started at each position."""
    steps, written = 3, 30
    prompts = [random.Random(n).choices(range(3, VOCABULARY), k=4 + n) for n in range(4)]
    longer = [alone(plain, p, max_tokens=written + steps + 1, temperature=0.0).token_ids for p in prompts]
    texts = [TargetText(n, tuple(p), ids[:written]) for n, (p, ids) in enumerate(zip(prompts, longer, strict=True))]
    target = make_decoder(plain)
    embedding = local(plain).tensors()["model.embed_tokens.weight"]
    torch.manual_seed(0)
    config = head_config(local(plain).config(), REDUCED)
    head = new_head(config, config["hidden_size"])
    ids_R = frequent_ids(texts, REDUCED, VOCABULARY)
    head.set_vocabulary(ids_R)
    depths = feature_depths(2)
    teacher = Teacher(target, depths, ids_R)
    plan = Plan(50, 4, 2, steps, lambda step: 5e-3, 0)
    before, _ = evaluate(head, embedding, teacher, texts, plan)
    reports = list(train(head, embedding, teacher, texts, plan, Plainly(list(head.parameters()))))
    after, accept = evaluate(head, embedding, teacher, texts, plan)
    assert [report.step for report in reports] == list(range(1, 51)) and after < 0.9 * before
    assert accept[0] > 0.3, "it learnt enough for a comparison"

    right, asked = [0] * steps, [0] * steps
    loaded = LoadedHead(head.eval(), embedding, depths)
    greedy = SamplingParams(temperature=0.0)
    for text, ids in zip(texts, longer, strict=True):
        features = teacher.lesson([text]).features_BTF[0]
        whole = [*text.prompt_ids, *ids]
        for first in range(len(text.prompt_ids) - 1, len(text.prompt_ids) + written):
            # The tokens up to `first` are certain; the target's word after it is the first that is drafted.
            if first < 1:
                continue
            drafter = EagleDrafter(loaded, 1, 512)
            drafter.begin(0, whole[: first + 1], features[:first])
            drafts = drafter.propose([steps], [greedy], torch.zeros(1, steps).double(), probs=False)
            for depth, token in enumerate(drafts.tokens_BN[0].tolist()):
                if first + depth >= len(text.prompt_ids) + written:
                    break
                asked[depth] += 1
                if token != whole[first + 1 + depth]:
                    break
                right[depth] += 1
    assert accept == pytest.approx([r / a for r, a in zip(right, asked, strict=True)], abs=0.02)


def test_a_head_in_bf16_has_the_same_loss_and_gradient_but_for_rounding(plain: Path, head_files: Path) -> None:
    texts = [TargetText(n, (5, 6, 7), tuple(random.Random(n).choices(range(3, VOCABULARY), k=20))) for n in range(3)]
    embedding = local(plain).tensors()["model.embed_tokens.weight"]
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        head = load_head(head_files, local(plain), dtype, CPU).head.requires_grad_(True)
        lesson = Teacher(make_decoder(plain, dtype), feature_depths(2), head.ids_R).lesson(texts)
        loss, _ = unroll(head, embedding, lesson, 3)
        loss.backward()
        assert head.lm_head.weight.grad is not None
        losses.append(float(loss.detach()))
        gradients.append(head.lm_head.weight.grad.float().flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.95


def test_batches_depend_on_the_step_alone_and_each_epoch_has_all() -> None:
    for count, size in ((10, 3), (4, 8), (7, 7)):
        epoch: list[int] = []
        for step in range(count):
            batch = batch_of(count, size, step, 1)
            assert batch == batch_of(count, size, step, 1) and len(batch) == min(size, count)
            epoch += batch
        if size <= count:
            assert sorted(epoch[:count]) == list(range(count)), "nothing is learnt twice before all was once"
    assert batch_of(50, 50, 0, 1) != batch_of(50, 50, 0, 2)


def test_the_reduced_vocabulary_has_what_is_said_most() -> None:
    texts = [TargetText(0, (1,), (9, 9, 9, 5, 5, 7))]
    assert frequent_ids(texts, 2, 12).tolist() == [5, 9]
    assert frequent_ids(texts, 5, 12).tolist() == [0, 1, 5, 7, 9]
