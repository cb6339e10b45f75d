"""Adapters beside the weights in place, one for each sequence: a step's rows may have different ones.

    y = W x + s B A x,  s = alpha / rank        (LoRA, arXiv 2106.09685; rsLoRA: alpha / √rank)

W x is computed once for all rows; each adapter in use then adds its own two thin products to its rows. Where several
checkpoint matrices are one here (q, k and v), so are their A's, stacked, and their B's, block by block.

Invariants: an adapter is loaded whole or not at all, and refused where it holds anything that would be left out; a row
without an adapter is computed exactly as if there were none.

Shapes: R ranks of one adapter's parts, together; H input, O output width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1024

UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias")
"""Settings of `peft` that change what is computed, and that are not computed here."""


class Adaptable(Protocol):
    """A linear map made of checkpoint matrices."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Their names and rows, in order."""

    @property
    def columns(self) -> int: ...


@dataclass(frozen=True)
class _Pair:
    down_RH: Tensor
    up_OR: Tensor
    """Scale included."""


class Adapter:
    """One adapter's matrices.

    Args:
        layers: for each layer of the model, its linear maps by name.

    Raises:
        ModelError: it is damaged, of another model, or does more than add to these maps.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        layers: Sequence[Mapping[str, Adaptable]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = name
        scale = _Scale(_config(directory))
        found = _matrices(directory)
        self._pairs: dict[tuple[int, str], _Pair] = {}
        for index, linears in enumerate(layers):
            for key, linear in linears.items():
                pair = _fused(found, index, linear, scale, directory)
                if pair is not None:
                    self._pairs[index, key] = _Pair(pair.down_RH.to(device, dtype), pair.up_OR.to(device, dtype))
        if found:
            raise ModelError(
                f"adapter {directory} changes '{next(iter(found))}', which cannot be adapted here.",
                "Adapters may change the attention's and the MLP's projections of this model's layers.",
            )

    def add(self, layer: int, linear: str, x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        """Add this adapter's part to what a linear map made of x [B, T, H]: y [B, T, O].

        Args:
            rows: which of the B rows have this adapter; None: all.
        """
        pair = self._pairs.get((layer, linear))
        if pair is None:
            return
        if rows is None:
            y += (x @ pair.down_RH.T) @ pair.up_OR.T
        else:
            y.index_add_(0, rows, (x[rows] @ pair.down_RH.T) @ pair.up_OR.T)


Group = tuple[Adapter, Tensor | None]


def grouped(adapters: Sequence[Adapter | None], device: torch.device) -> list[Group]:
    """The adapters in use, each with its rows."""
    rows: dict[Adapter, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter is not None:
            rows.setdefault(adapter, []).append(row)
    return [
        (adapter, None if len(own) == len(adapters) else torch.tensor(own, device=device))
        for adapter, own in rows.items()
    ]


class _Scale:
    """What a pair's product is multiplied with."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alpha = float(config["lora_alpha"])
        self._root = bool(config.get("use_rslora"))

    def of(self, rank: int) -> float:
        return self._alpha / (math.sqrt(rank) if self._root else rank)


def _config(directory: Path) -> dict[str, Any]:
    try:
        path = directory / CONFIG
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too long")
        found = json.loads(path.read_text())
        kind, alpha = found["peft_type"], float(found["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{directory} holds no adapter: {error}.", "Give a folder that peft has saved.") from None
    if kind != "LORA" or not math.isfinite(alpha):
        raise ModelError(f"{directory} holds an adapter of type {kind}.", "Only LoRA adapters can be used.")
    extra = [name for name in UNSUPPORTED if found.get(name)]
    if found.get("bias", "none") != "none":
        extra.append("bias")
    if extra:
        raise ModelError(f"adapter {directory} uses {', '.join(extra)}, which is not supported.", "Merge it instead.")
    return dict(found)


def _matrices(directory: Path) -> dict[str, Tensor]:
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{directory / WEIGHTS} cannot be read: {error}.", "Save the adapter again.") from None


def _fused(found: dict[str, Tensor], index: int, linear: Adaptable, scale: _Scale, directory: Path) -> _Pair | None:
    """Take a linear map's matrices out of `found`; None where there are none."""
    downs: list[Tensor] = []
    ups: list[tuple[int, Tensor]] = []
    at = 0
    for part, rows in linear.parts.items():
        prefix = f"base_model.model.model.layers.{index}.{part}.lora_"
        down, up = found.pop(f"{prefix}A.weight", None), found.pop(f"{prefix}B.weight", None)
        if (down is None) != (up is None):
            raise ModelError(f"adapter {directory} has half of what it adds to '{part}'.", "Save the adapter again.")
        if down is not None and up is not None:
            rank = down.shape[0]
            fits = down.shape == (rank, linear.columns) and up.shape == (rows, rank) and 0 < rank <= MAX_RANK
            if not fits or not (down.is_floating_point() and up.is_floating_point()):
                raise ModelError(
                    f"adapter {directory} adds {tuple(up.shape)} x {tuple(down.shape)} to '{part}' of layer {index}, "
                    f"which is {(rows, linear.columns)}.",
                    "It is of another model.",
                )
            downs.append(down.float())
            ups.append((at, up.float() * scale.of(rank)))
        at += rows
    if not downs:
        return None
    ranks = sum(down.shape[0] for down in downs)
    up_OR = torch.zeros(at, ranks)
    column = 0
    for row, up in ups:
        up_OR[row : row + up.shape[0], column : column + up.shape[1]] = up
        column += up.shape[1]
    return _Pair(torch.cat(downs), up_OR)
