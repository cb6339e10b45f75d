"""The estimate of memory: counts that can be checked against real models, and what must grow with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learner_cases import tiny_model

from shoal.config import Config, config_from
from shoal.errors import CapacityError
from shoal.learner.memory import KNOWN, Shape, check_fits, learner_bytes, shape_of, worker_bytes
from shoal.learner.optimizer import MasterAdamW
from shoal.learner.trainer import Trainer


def config(**learner: Any) -> Config:
    return config_from({"envs": {"a": {"type": "arithmetic"}}, "learner": learner})


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_parameters_are_those_of_the_model(kind: str) -> None:
    model = tiny_model(kind)
    shape = Shape.of(model.config.to_dict())
    norms_of_heads = 2 * 2 * 8 if kind == "qwen3" else 0
    assert shape.parameters + norms_of_heads == sum(p.numel() for p in model.parameters())


def test_known_models_have_the_size_they_are_named_for() -> None:
    sizes = {name: Shape.of(shape).parameters / 1e9 for name, shape in KNOWN.items()}
    assert sizes["embedded"] == pytest.approx(0.1345, abs=1e-4)
    assert sizes["Qwen/Qwen3-4B"] == pytest.approx(4.02, abs=0.01)
    assert sizes["Qwen/Qwen3-8B"] == pytest.approx(8.19, abs=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_what_the_trainer_holds_is_what_is_said(optimizer: str) -> None:
    """Weights, masters, moments and their sums, counted in the real trainer after a step."""
    import torch

    settings = config(optimizer=optimizer, device="cpu")
    trainer = Trainer(tiny_model("llama", dtype=torch.bfloat16), settings.learner)
    assert isinstance(trainer.optimizer, MasterAdamW)
    for parameter in trainer.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.accumulate()
    trainer.optimizer.step(1e-3)
    state = trainer.optimizer.state_dict()
    said = learner_bytes(settings, Shape.of(trainer.model.config.to_dict()))
    moments = sum(v.nbytes for key, v in state.items() if key.startswith("exp_avg"))
    masters = sum(v.nbytes for key, v in state.items() if key.startswith("master"))
    assert masters == said["masters"]
    assert moments == pytest.approx(said["optimizer"], rel=0.08), "blocks of small tensors are padded"


def test_each_wish_costs_or_saves() -> None:
    shape = Shape.of(KNOWN["Qwen/Qwen3-4B"])

    def total(**learner: Any) -> int:
        return sum(learner_bytes(config(**learner), shape).values())

    plain = total()
    assert total(optimizer="adamw8bit") < plain - 5 * shape.parameters
    long = total(microbatch_tokens=4096)
    assert total(microbatch_tokens=4096, gradient_checkpointing=True) < long and plain < long
    assert total(loss={"kl_beta": 0.1}) == plain + 2 * shape.parameters
    assert total(lora={"rank": 16}) < plain / 2
    assert worker_bytes(config(), shape)["cache"] == 2 * 36 * 1024 * 2 * 16384


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="needs 2.0 GiB of the GPU's memory, which has 1.0 GiB"):
        check_fits(2 * 2**30, 2**30, "the GPU's memory")
    check_fits(1, 2, "this machine's memory")
    assert shape_of(str(tmp_path)) is None and shape_of("no/such-model-anywhere") is None and shape_of("x y") is None
    tiny_model().save_pretrained(tmp_path)
    found = shape_of(str(tmp_path))
    assert found is not None and found.layers == 2


def test_processes_share_what_is_divided_among_them() -> None:
    shape = Shape.of(KNOWN["Qwen/Qwen3-4B"])
    alone, shared = (learner_bytes(config(processes=n), shape) for n in (1, 4))
    for part in ("masters", "gradients", "optimizer"):
        assert shared[part] == alone[part] // 4
    assert shared["weights"] == 0 and "gathered" not in alone, "what is trained is in the masters"
    assert shared["activations"] <= alone["activations"]
    adapters = learner_bytes(config(processes=4, lora={}), shape)
    assert adapters["weights"] == pytest.approx(alone["weights"] / 4, rel=0.02)
    assert sum(shared.values()) < sum(alone.values())
