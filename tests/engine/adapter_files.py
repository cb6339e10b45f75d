"""Adapters as `peft` saves them, and the models that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_cases import reference
from peft import LoraConfig, get_peft_model

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    directory: Path, base: Path, *, seed: int, targets: tuple[str, ...] = EVERYWHERE, rank: int = 4, **more: Any
) -> Any:
    """Save a random adapter of `base`; gives `transformers`' model with it merged."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=list(targets), **more)
    model = get_peft_model(reference(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(directory))
    return model.merge_and_unload().eval()
