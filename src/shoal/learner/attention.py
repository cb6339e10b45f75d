"""Attention over packed rows: each rollout sees its prompt and its own past, and nothing else of the row.

A row's T × T mask would be mostly zeros, so there is none: every span (a prompt and its rollouts) is two small
problems. The prompt attends to itself; the rollouts, laid side by side in a grid padded to the longest of them,
attend to the prompt's keys followed by their own. The query heads that share a key head are stacked as further
query rows, so keys are never copied.

Registered with `transformers` under `NAME`, the interface it offers for this. A forward pass without a layout (any
ordinary use of the model) gets the library's own scaled-dot-product attention.

Invariants: the result equals one-sequence-per-row causal attention (tested, values and gradients); padding is only
ever a key of later padding, so it reaches no real token.

Shapes: T tokens of a row, P of a prompt, G rollouts of at most R tokens, N query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoal.learner.packing import Span

NAME = "shoal_packed"

PLAIN_MAX_KEYS = 192
"""Up to this many keys a query, plain matrix products are used on a CPU: the fused kernel's backward pass takes 3.8
against 0.7 ms there at 65 keys in bf16; at 145 keys they are level, and plain products keep all scores in memory."""


@dataclass(frozen=True)
class SpanLayout:
    """One span on the device."""

    start: int
    prefix: int
    end: int
    rollouts: int
    width: int
    """R: input tokens of the longest rollout."""
    slots: Tensor
    """int64, [tokens after the prompt]: where each goes in the flattened G × R grid."""
    prompt_mask: Tensor
    """bool, [(N/K)·P, P]: true where a query may look."""
    rollout_mask: Tensor
    """bool, [(N/K)·R, P + R]."""


def layout(spans: Sequence[Span], heads_per_key: int, device: torch.device) -> list[SpanLayout]:
    """Masks and indices of a row's spans; the same for every layer."""
    return [_span_layout(span, heads_per_key, device) for span in spans]


def _span_layout(span: Span, heads_per_key: int, device: torch.device) -> SpanLayout:
    width = max(span.lengths)
    slots = torch.cat([torch.arange(length) + g * width for g, length in enumerate(span.lengths)])
    prompt = torch.ones(span.prefix, span.prefix, dtype=torch.bool).tril()
    own = torch.ones(width, width, dtype=torch.bool).tril()
    rollout = torch.cat((torch.ones(width, span.prefix, dtype=torch.bool), own), dim=1)
    return SpanLayout(
        start=span.start,
        prefix=span.prefix,
        end=span.end,
        rollouts=len(span.lengths),
        width=width,
        slots=slots.to(device),
        prompt_mask=prompt.repeat(heads_per_key, 1).to(device),
        rollout_mask=rollout.repeat(heads_per_key, 1).to(device),
    )


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend through this module."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Sequence[SpanLayout] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention interface: query [1, N, T, D], key and value [1, K, T, D] to [1, T, N, D].

    Args:
        spans: the row's layout; without it this is `transformers`' own attention.
    """
    if spans is None:
        mixed, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return mixed, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_TND, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    parts: list[Tensor] = []
    for span in spans:
        here = slice(span.start, span.end)
        parts += _attend_span(q_TND[here], k_TKD[here], v_TKD[here], span, scale)
    return torch.cat(parts)[None], None


def _attend_span(q: Tensor, k: Tensor, v: Tensor, span: SpanLayout, scale: float) -> list[Tensor]:
    """Attention inside one span: the prompt's output [P, N, D], then the rollouts' [tokens, N, D]."""
    prefix, rollouts, width = span.prefix, span.rollouts, span.width
    prompt = _attend(q[None, :prefix], k[None, :prefix], v[None, :prefix], span.prompt_mask, scale)[0]
    if width == 0:
        return [prompt]
    keys, values = (
        torch.cat((x[:prefix].expand(rollouts, *x[:prefix].shape), _to_grid(x[prefix:], span)), dim=1) for x in (k, v)
    )
    mixed = _attend(_to_grid(q[prefix:], span), keys, values, span.rollout_mask, scale)
    return [prompt, _FromGrid.apply(mixed.reshape(rollouts * width, *mixed.shape[2:]), span.slots)]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Masked attention of q [B, L, N, D] over k and v [B, M, K, D]; gives [B, L, N, D]."""
    batch, width, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.view(batch, width, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * width, dim)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and k.shape[2] <= PLAIN_MAX_KEYS:
        scores = torch.matmul(q, k.transpose(2, 3)).float() * scale
        weights = torch.softmax(scores.masked_fill_(~mask, float("-inf")), dim=-1)
        mixed = torch.matmul(weights.to(v.dtype), v)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.view(batch, kv_heads, group, width, dim).permute(0, 3, 1, 2, 4).reshape(batch, width, heads, dim)


def _to_grid(x: Tensor, span: SpanLayout) -> Tensor:
    """Rollout tokens [tokens, …] into the zero-padded grid [G, R, …]."""
    size = span.rollouts * span.width
    grid: Tensor = x.view(size, *x.shape[1:]) if len(x) == size else _ToGrid.apply(x, span.slots, size)
    return grid.view(span.rollouts, span.width, *x.shape[1:])


class _ToGrid(torch.autograd.Function):
    """Scatter rows to distinct places among zeros; its gradient is a plain gather, much cheaper than autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _FromGrid(torch.autograd.Function):
    """The inverse of `_ToGrid`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = len(x)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots = ctx.saved_tensors[0]
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None
