"""A version published as its adapters is, beside the base model, what the learner would have published merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_cases import random_episodes, tiny_model
from torch import Tensor

from shoal.broadcast.tensors import TensorView
from shoal.config.learner import AsyncLearner, Lora
from shoal.engine.merging import adapter_tensors, merged
from shoal.engine.source import LocalModel
from shoal.engine.weights import from_views, to_views
from shoal.errors import ModelError
from shoal.learner.trainer import Trainer

LORA = Lora(rank=4, alpha=8.0)


def trained(dtype: torch.dtype, folder: Path) -> tuple[LocalModel, Trainer]:
    """A base model on the disk, and adapters for it after some steps."""
    model = tiny_model(dtype=dtype)
    model.save_pretrained(folder)
    trainer = Trainer(model, AsyncLearner(lr=5e-2, lora=LORA))
    for seed in range(3):
        trainer.step(random_episodes(seed))
    return LocalModel("tiny", folder), trainer


def published(trainer: Trainer) -> dict[str, TensorView]:
    return to_views(adapter_tensors(trainer.trainable(), LORA.alpha, trainer.model.dtype))


def test_the_learners_own_merge_bit_for_bit(tmp_path: Path) -> None:
    base, trainer = trained(torch.float32, tmp_path)
    found, expected = from_views(merged(base, published(trainer))), trainer.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(found[name], value) for name, value in base.tensors().items())


def test_in_bf16_the_adapters_are_rounded_as_weights_are(tmp_path: Path) -> None:
    base, trainer = trained(torch.bfloat16, tmp_path)
    views = published(trainer)
    assert {view.dtype for name, view in views.items() if "lora_" in name} == {"BF16"}
    found = from_views(merged(base, views))
    for name, value in trainer.tensors().items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=2**-7 * float(value.abs().max()))


def test_whole_versions_pass_and_foreign_adapters_do_not(tmp_path: Path) -> None:
    base, trainer = trained(torch.float32, tmp_path)
    whole = to_views(trainer.tensors())
    assert merged(base, whole) is whole
    given: dict[str, Tensor] = from_views(published(trainer))
    layer = next(name for name in given if name.endswith(".lora_A"))
    for name, wrong in ((layer, given[layer][:, 1:]), (layer, given[layer][:2]), (layer, given[layer][:0])):
        with pytest.raises(ModelError, match="does not fit"):
            merged(base, to_views({**given, name: wrong.contiguous()}))
    with pytest.raises(ModelError, match="lacks"):
        merged(base, to_views({**given, "model.layers.9.mlp.up_proj.lora_A": given[layer]}))
