"""Low-rank adapters (LoRA, arXiv 2106.09685) through `peft`: put in, switched off, merged on the side.

    W' = W + (alpha / rank) · B A,   only A and B are trained

Invariants: merging for publication never touches the model being trained; merged tensors have the names and dtypes
of the model without adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.config.learner import Lora
from shoal.errors import ConfigError

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, settings: Lora) -> None:
    """Freeze `model` and put adapters beside the named linear layers, in place.

    Raises:
        ConfigError: no layer has such a name, or the LM head is among them.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("learner.lora needs the package 'peft'.", "Install it: pip install 'shoal[lora]'.") from None
    if "lm_head" in settings.targets:
        raise ConfigError("lora.targets names lm_head, which cannot carry an adapter.", "Leave it out.")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"lora.targets does not fit the model: {error}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Known by what they offer, so that peft is imported only where adapters are put in."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model computes as it did before it had adapters."""
    layers = _adapted_layers(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


@torch.no_grad()
def merged_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights by the names they have without adapters, adapters merged, tied weights once.

    Without adapters these are the model's own tensors, not copies.
    """
    deltas = {
        f"{name}.base_layer.weight": layer.get_delta_weight(ADAPTER) for name, layer in _adapted_layers(model).items()
    }
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # lists a tied weight once, under its first name
        if ".lora_" in name:
            continue
        value = parameter.detach()
        if name in deltas:
            value = (value.float() + deltas[name].float()).to(value.dtype)
        found[name.replace(".base_layer.", ".")] = value
    return found


def merged_by_name(tensors: Mapping[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """As `merged_tensors`, from all of a model's tensors by the names that they have with adapters."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        down, up = (tensors.get(f"{layer}.lora_{part}.{ADAPTER}.weight") for part in "AB")
        if down is not None and up is not None:
            delta = (up.float() @ down.float()) * (settings.alpha / settings.rank)
            value = (value.float() + delta).to(value.dtype)
        found[name.replace(".base_layer.", ".")] = value
    return found
