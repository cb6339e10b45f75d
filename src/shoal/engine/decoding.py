"""A decoder's layers for one new token a row or a few, on a CPU: matrix products by torch, the rest by `kernels`.

The same numbers as the general pass of `model`, which serves prompts, trees of drafts and other devices: in fp32 to
rounding; in bf16 with fewer roundings in between. Where a batch decodes, torch took nearly half of the time for what
is not a matrix product, so this is worth a pass of its own.

Invariant: reads and writes of row b's cache stay below position start[b] + T, which the caller has reserved; where it
has not, nothing is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.cache import KVCache

if TYPE_CHECKING:
    from shoal.engine.model import Architecture

TYPES = (torch.bfloat16, torch.float32)

FEW = 8
"""New tokens a row up to which a token's attention by itself is faster than small products of many."""


class Layer(Protocol):
    """What is used of a layer beside its matrices."""

    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `kernels` compute with numbers of this type here."""
    return device.type == "cpu" and dtype in TYPES


@once
def _kernels(group: int, dim: int) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    # numba takes a third of a second to import, and only processes that decode need it.
    from shoal.engine import kernels

    return kernels.make_attend(group, dim), kernels.add_norm, kernels.gate


def as_array(x: Tensor) -> Any:
    """The tensor's own memory, as the kernels take it: bfloat16 as its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def decode(
    arch: Architecture,
    layers: Sequence[Layer],
    project: Callable[[int, str, Tensor], Tensor],
    hidden_BTH: Tensor,
    start_B: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: KVCache,
    first_slot: int,
    observe: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """Hidden states [B, T, H] behind the layers, before any final norm.

    Args:
        project: multiplies by the matrix of layer and name, adapters included.
        angles: cosines and sines, [B, T, 1, D] each.
        observe: told the hidden states that enter each layer.
    """
    (batch, width), inner, dim = hidden_BTH.shape[:2], arch.intermediate_size, arch.head_dim
    heads, kv_heads = arch.num_heads, arch.num_kv_heads
    attend, add_norm, gate = _kernels(heads // kv_heads, dim)
    scale, eps = np.float32(dim**-0.5), np.float32(arch.norm_eps)
    starts = start_B.numpy()
    # Kernels look at no bounds: what is wrong here would be written over somebody's memory.
    if starts.min() < 0 or starts.max() + width > cache.capacity or first_slot + batch > cache.num_slots:
        raise IndexError(f"rows {first_slot} to {first_slot + batch} at {starts.tolist()} are not in the cache.")
    cos, sin = (as_array(angle.reshape(batch, width, dim)) for angle in angles)
    # Whoever gave the hidden states, or observes them, may keep them.
    hidden = hidden_BTH.clone(memory_format=torch.contiguous_format)
    added = torch.zeros_like(hidden)
    normed, mixed = torch.empty_like(hidden), hidden.new_empty(batch, width, heads * dim)
    gated = hidden.new_empty(batch, width, inner)
    hidden_, normed_, gated_ = (as_array(x.view(batch * width, -1)) for x in (hidden, normed, gated))
    mixed_ = as_array(mixed.view(batch, width, heads, dim))
    for index, layer in enumerate(layers):
        add_norm(hidden_, as_array(added.view(batch * width, -1)), as_array(layer.norm1), eps, normed_)
        if observe is not None:
            observe(index, hidden.clone())
        qkv = project(index, "qkv", normed).view(batch, width, heads + 2 * kv_heads, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, :, :heads] = F.rms_norm(qkv[:, :, :heads], (dim,), layer.q_norm, arch.norm_eps)
            key_heads = slice(heads, heads + kv_heads)
            qkv[:, :, key_heads] = F.rms_norm(qkv[:, :, key_heads], (dim,), layer.k_norm, arch.norm_eps)
        keys, values = cache.rows_of(index, first_slot, batch)
        attend(as_array(qkv), cos, sin, as_array(keys), as_array(values), starts, scale, mixed_)
        added = project(index, "out", mixed)
        add_norm(hidden_, as_array(added.view(batch * width, -1)), as_array(layer.norm2), eps, normed_)
        gate(as_array(project(index, "gate_up", normed).view(batch * width, 2 * inner)), gated_)
        added = project(index, "down", gated)
    return hidden + added
