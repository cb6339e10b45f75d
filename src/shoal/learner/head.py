"""The LM head and the softmax in one differentiable step that never holds more fp32 logits than one chunk.

    log π(o_t)            = z_t[o_t] - logsumexp(z_t),   z_t = W h_t / T
    d log π(o_t) / d z_t  = onehot(o_t) - p_t,           p_t = softmax(z_t)

Where a grammar constrained the sampling, z is −∞ for the tokens that it forbade, so π is the masked distribution that
was sampled from (`engine.grammar` says why), and forbidden tokens get no gradient.

1. Logits are computed in the model's dtype and then raised to fp32, exactly as the sampling engine does, so that
   both round alike.

Invariants: log-probabilities and entropy are fp32; entropy is detached. For the backward pass p - onehot is kept in
the model's dtype (N × V), subtracted in fp32 so that a nearly certain token keeps its small gradient; or it is
computed again there, where memory matters more than time.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_POSITIONS = 256
"""Positions whose fp32 logits exist at once: 50 MB for 49 k tokens of vocabulary, 156 MB for 152 k."""

FORBIDDEN = -1e30
"""Logit of a forbidden token: its probability is exactly 0, as for −∞, and 0 times it is 0."""


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    *,
    allowed: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π of the targets, with gradient, and the entropy of each distribution, without; both [N], fp32, in nats.

    Args:
        hidden: [N, H].
        weight: [V, H], the LM head.
        targets: [N], int64.
        temperatures: [N], all above 0; None is 1 everywhere.
        allowed: [N, ceil(V / 8)], uint8: which tokens could be drawn, the first in the lowest bit; None is all of them.
        recompute: compute the logits again in the backward pass instead of keeping probabilities.
    """
    logprobs, entropy = _ChosenLogprobs.apply(hidden, weight, targets, temperatures, allowed, recompute)
    return logprobs, entropy


def _chunks(count: int) -> list[slice]:
    return [slice(first, min(first + CHUNK_POSITIONS, count)) for first in range(0, count, CHUNK_POSITIONS)]


def _logits(at: slice, hidden: Tensor, weight: Tensor, temperatures: Tensor | None, allowed: Tensor | None) -> Tensor:
    """fp32 logits of some positions, as the token there was drawn from them."""
    logits = torch.mm(hidden[at], weight.t()).float()
    if temperatures is not None:
        logits.div_(temperatures[at, None])
    if allowed is not None:
        logits.masked_fill_(~_unpacked(allowed[at], logits.shape[1]), FORBIDDEN)
    return logits


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """Bits as bool, [N, count]."""
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1)[:, :count].bool()


def _subtract_onehot(probs: Tensor, targets: Tensor) -> Tensor:
    """p - onehot, in place."""
    return probs.scatter_add_(1, targets[:, None], probs.new_full((len(targets), 1), -1.0))


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperatures: Tensor | None,
        allowed: Tensor | None,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        count = len(hidden)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        kept = None if recompute or not any(ctx.needs_input_grad) else hidden.new_empty(count, len(weight))
        for at in _chunks(count):
            logits = _logits(at, hidden, weight, temperatures, allowed)
            # softmax and one maximum are several times faster on a CPU than logsumexp or a second exponential.
            top, where = logits.max(dim=-1)
            probs = torch.softmax(logits, dim=-1)
            log_total = top - probs.gather(1, where[:, None])[:, 0].log()
            logprobs[at] = logits.gather(1, targets[at, None])[:, 0] - log_total
            entropy[at] = log_total - torch.einsum("nv,nv->n", probs, logits)
            if kept is not None:
                kept[at] = _subtract_onehot(probs, targets[at])
        ctx.save_for_backward(hidden, weight, targets, temperatures, allowed, kept)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperatures, allowed, kept = ctx.saved_tensors
        scale = (-grad if temperatures is None else -grad / temperatures)[:, None].to(hidden.dtype)
        scaled_hidden = hidden * scale
        if kept is not None:
            grad_weight = torch.mm(kept.t(), scaled_hidden) if ctx.needs_input_grad[1] else None
            return torch.mm(kept, weight) * scale, grad_weight, None, None, None, None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for at in _chunks(len(hidden)):
            logits = _logits(at, hidden, weight, temperatures, allowed)
            difference = _subtract_onehot(torch.softmax(logits, dim=-1), targets[at]).to(hidden.dtype)
            grad_hidden[at] = torch.mm(difference, weight) * scale[at]
            if grad_weight is not None:
                grad_weight.addmm_(difference.t(), scaled_hidden[at])
        return grad_hidden, grad_weight, None, None, None, None
