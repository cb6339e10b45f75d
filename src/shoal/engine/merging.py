"""A policy that is published as its LoRA adapters, made whole again beside the base model.

    W' = W + (alpha / rank) · B A        for each adapted layer; all other tensors are the base model's

A learner that trains adapters publishes A, B and alpha only, a small part of the model's bytes. Who loads such a
version merges it once, in fp32, and then computes as with any other: a token costs nothing more.

Invariants: tensors of a version without adapters pass unchanged; a version with adapters that do not fit the base model
is refused; the base model on the disk is never written. What is merged here is what the learner merges for the same A
and B, bit for bit on the same hardware.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.broadcast.tensors import TensorView
from shoal.engine.source import LocalModel
from shoal.engine.weights import from_views, to_views
from shoal.errors import ModelError

ALPHA = "lora.alpha"
"""The tensor that says that a version is adapters: one number."""

TRAINED = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.[^.]+\.weight")
"""What `peft` calls an adapter's matrices in a model."""


def adapter_tensors(trained: Mapping[str, Tensor], alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a version consists of: the matrices by `LAYER.lora_A` and `LAYER.lora_B`, rounded to the model's dtype, as
    merged weights are, and alpha."""
    found = {ALPHA: torch.tensor(alpha, dtype=torch.float32)}
    for name, parameter in trained.items():
        match = TRAINED.fullmatch(name)
        assert match is not None, f"{name} is no adapter's"
        found[f"{match['layer']}.lora_{match['part']}"] = parameter.detach().to(dtype)
    return found


def merged(base: LocalModel, views: Mapping[str, TensorView]) -> Mapping[str, TensorView]:
    """All tensors of a version, whether it is published whole or as adapters. Blocking.

    Raises:
        ModelError: its adapters are of another model.
    """
    if ALPHA not in views:
        return views
    given = from_views(views)
    alpha = float(given.pop(ALPHA))
    found: dict[str, Tensor] = {}
    for name, weight in base.tensors().items():
        layer = name.removesuffix(".weight")
        down, up = given.pop(f"{layer}.lora_A", None), given.pop(f"{layer}.lora_B", None)
        found[name] = weight if down is None or up is None else _merge(layer, weight.to(down.dtype), down, up, alpha)
    if given:
        raise ModelError(f"the version adapts '{next(iter(given))}', which the base model lacks.", "Use its own model.")
    return to_views(found)


@torch.no_grad()
def _merge(layer: str, weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, alpha: float) -> Tensor:
    rank = down_RI.shape[0]
    if rank == 0 or weight_OI.shape != (up_OR.shape[0], down_RI.shape[-1]) or up_OR.shape[-1] != rank:
        raise ModelError(f"the version's adapter of '{layer}' does not fit the base model.", "Use its own model.")
    delta_OI = (up_OR.float() @ down_RI.float()) * (alpha / rank)
    return (weight_OI.float() + delta_OI).to(weight_OI.dtype)
