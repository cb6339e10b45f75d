"""A policy from a local checkpoint, ready to be trained.

Invariant: nothing is fetched and nothing in the directory is executed; whatever can't be read ends in `ModelError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from shoal.engine.source import LocalModel
from shoal.errors import ModelError
from shoal.learner.forward import prepare

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"there is no device '{name}' here.", "Set device to 'auto' or 'cpu'.")
    return device


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, `transformers` draws none: the terminal belongs to the run's own view."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_policy(local: LocalModel, dtype: Literal["bf16", "fp32"], device: str = "auto") -> PreTrainedModel:
    """The causal language model of a checkpoint (Hugging Face layout, safetensors), prepared for training.

    Raises:
        ModelError: it is missing, damaged, or of a type that can't be trained.
    """
    where = resolve_device(device)
    try:
        with no_progress_bars():
            model = _from_directory(local.directory, dtype) if local.weights is None else _from_file(local, dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        source = local.weights or local.directory
        raise ModelError(f"the model in {source} can't be loaded: {reason}", "Check that it is whole.") from None
    prepare(model)
    return model.to(where)


def _from_directory(directory: Path, dtype: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=DTYPES[dtype],
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model


def _from_file(local: LocalModel, dtype: str) -> PreTrainedModel:
    """From the one file that the user named: `from_pretrained` would take whatever else the directory holds."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(local.config(), dtype=DTYPES[dtype])
    missing, _ = model.load_state_dict(local.tensors(), strict=False)
    model.tie_weights()
    lacking = sorted(set(missing) - set(model.all_tied_weights_keys))
    if lacking:
        raise ValueError(f"{len(lacking)} tensors are missing, {lacking[0]} first.")
    return model
