"""Draw one token a row from logits, and say with which log-probability it was drawn.

Invariants: a reported log-probability is that of the distribution the token was really drawn from: tempered, and
truncated where top-k or top-p ask for it (greedy rows report the untempered one; nobody may train on those). A token
of logit −∞ is never drawn. A row's draw depends on its own logits and its own uniform number alone: a seeded request
gives the same tokens whatever else is in the batch, up to near-ties in the logits.

A draw inverts the cumulative distribution in two levels: first the block of the vocabulary, then the token in it. So
the exponential is the only full pass besides the maximum, and the sums that decide are short and in fp64. Where a
grammar leaves few tokens, nothing is computed for the others: a constrained row then costs no more than a free one.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.decoding import as_array, has_kernels
from shoal.engine.shaping import Shaper
from shoal.protocol.sampling import SamplingParams

BLOCK = 256
"""Tokens a block of the first level holds: near the square root of a vocabulary."""

LOWEST_TEMPERATURE = 1e-30
"""Lower ones are taken for this one, which fp32 can still divide by."""

PIECE_ELEMENTS = 1 << 19
"""Logits handled at once: a few megabytes stay in the processor's cache and in memory that is already mapped."""


@torch.inference_mode()
def sample(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    shapers: Sequence[Shaper | None] = (),
) -> tuple[list[int], list[float]]:
    """Token ids and their log-probabilities (nats), one a row; a row whose logits aren't numbers reports NaN.

    Args:
        logits_BV: any floating type; computed with in fp32.
        uniforms: one number in [0, 1) a row; unused for greedy rows.
        shapers: what changes each row's logits before all else; none at all, or one entry a row.
    """
    ids, logprobs = [0] * len(params), [0.0] * len(params)
    rest = list(range(len(params)))
    if has_kernels(logits_BV.dtype, logits_BV.device):
        plain = [r for r, p in enumerate(params) if (p.is_exact or not p.temperature) and not (shapers and shapers[r])]
        for row, token, logprob in zip(plain, *_sample_plain(logits_BV, plain, params, uniforms), strict=True):
            ids[row], logprobs[row] = token, logprob
            rest.remove(row)
    if logits_BV.device.type == "cpu":
        for row, shaper in enumerate(shapers):
            if shaper is not None and (tokens := shaper.candidates(logits_BV.shape[-1])) is not None:
                ids[row], logprobs[row] = _sample_among(tokens, logits_BV[row], params[row], uniforms[row])
                rest.remove(row)
    whole = len(rest) == len(params)
    most = max(1, PIECE_ELEMENTS // logits_BV.shape[-1]) if logits_BV.device.type == "cpu" else len(params)
    for start in range(0, len(rest), most):
        piece = rest[start : start + most]
        found_ids, found_logprobs = _sample(
            logits_BV[start : start + most] if whole else logits_BV[piece],
            [params[row] for row in piece],
            [uniforms[row] for row in piece],
            [shapers[row] for row in piece] if shapers else (),
        )
        for row, token, logprob in zip(piece, found_ids.tolist(), found_logprobs.tolist(), strict=True):
            ids[row], logprobs[row] = token, logprob
    return ids, logprobs


def _sample_plain(
    logits_BV: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """As `sample` for rows that only have a temperature, without writing a number for every token."""
    if not rows:
        return [], []
    from shoal.engine import kernels

    chosen = logits_BV if len(rows) == len(params) else logits_BV[list(rows)]
    temperatures = [params[row].temperature for row in rows]
    ids, logprobs = np.empty(len(rows), np.int64), np.empty(len(rows))
    kernels.draw(
        as_array(chosen.contiguous()),
        np.array([max(t, LOWEST_TEMPERATURE) if t else 0.0 for t in temperatures], np.float32),
        np.array([uniforms[row] for row in rows]),
        ids,
        logprobs,
    )
    return ids.tolist(), logprobs.tolist()


def _sample_among(tokens_C: Tensor, logits_V: Tensor, params: SamplingParams, uniform: float) -> tuple[int, float]:
    """As `sample` for one row, all of whose other tokens are forbidden: what they would cost is saved."""
    # A few numbers: numpy is done with them before torch has begun.
    x = logits_V[tokens_C].double().numpy()
    x = (x - x.max()) / (max(params.temperature, LOWEST_TEMPERATURE) if params.temperature else 1.0)
    if params.temperature > 0 and not params.is_exact:
        x = truncate(torch.from_numpy(x), params.top_k, params.top_p).numpy()
    cumulative = np.exp(x).cumsum()
    total = cumulative[-1]
    if math.isnan(total):
        return int(tokens_C[0]), math.nan
    found = int(cumulative.searchsorted(uniform * total, side="right")) if params.temperature else int(x.argmax())
    return int(tokens_C[found]), min(0.0, float(x[found] - math.log(total)))


@torch.inference_mode()
def likeliest(logits_V: Tensor, params: SamplingParams, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their log-probabilities in the distribution that `sample` draws from."""
    x_V = logits_V.float() - logits_V.float().amax()
    if params.temperature:
        x_V = truncate(x_V / max(params.temperature, LOWEST_TEMPERATURE), params.top_k, params.top_p)
    found = torch.log_softmax(x_V, dim=-1).topk(min(count, x_V.shape[-1]))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return tuple((token, logprob) for token, logprob in pairs if logprob > float("-inf"))


@torch.inference_mode()
def alternatives(logits_V: Tensor, params: SamplingParams, shaper: Shaper) -> tuple[tuple[int, float], ...]:
    """As many of the likeliest as the shaper's request asked for, shaped as the token itself was."""
    shaped_V = logits_V.to(torch.float32, copy=True)
    shaper.apply(shaped_V)
    return likeliest(shaped_V, params, shaper.num_top)


def _sample(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    shapers: Sequence[Shaper | None],
) -> tuple[Tensor, Tensor]:
    x_BV = logits_BV.to(torch.float32, copy=True)
    for row, shaper in enumerate(shapers):
        if shaper is not None:
            shaper.apply(x_BV[row])
    # Relative to the maximum, so that no temperature, however low, overflows.
    x_BV -= x_BV.amax(dim=-1, keepdim=True)
    temperatures = [max(p.temperature, LOWEST_TEMPERATURE) if p.temperature else 1.0 for p in params]
    if any(t != 1.0 for t in temperatures):
        x_BV /= torch.tensor(temperatures, device=x_BV.device)[:, None]
    for row, p in enumerate(params):
        if p.temperature > 0 and not p.is_exact:
            x_BV[row] = truncate(x_BV[row], p.top_k, p.top_p)
    ids_B, total_B = _invert(x_BV.exp(), torch.tensor(uniforms, dtype=torch.float64, device=x_BV.device))
    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    if greedy:
        ids_B[greedy] = x_BV[greedy].argmax(dim=-1)
    logprobs_B = x_BV.gather(1, ids_B[:, None])[:, 0] - total_B.log()
    return ids_B, logprobs_B.clamp_(max=0.0)


def _invert(weights_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative weight passes u × total, and the total (fp64), for each row."""
    batch, vocabulary = weights_BV.shape
    blocks = F.pad(weights_BV, (0, -vocabulary % BLOCK)).view(batch, -1, BLOCK)
    mass = blocks.sum(dim=-1).double().cumsum(dim=-1)
    total = mass[:, -1:]
    # right=True finds the first entry above the target, whose own weight is therefore positive. There is one: a number
    # below 1 times the total rounds to less than the total.
    target = uniforms_B[:, None] * total
    block = torch.searchsorted(mass, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks[torch.arange(batch, device=block.device), block[:, 0]].double().cumsum(dim=-1)
    # The block's weight was summed in fp32 and may be a trifle more than that of its tokens.
    rest = torch.minimum(target - before, inner[:, -1:].nextafter(torch.zeros_like(total)))
    ids = block * BLOCK + torch.searchsorted(inner, rest, right=True)
    return ids[:, 0].clamp_(max=vocabulary - 1), total[:, 0]


def truncate(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the `top_k` largest, then all but the smallest set of mass ≥ `top_p`, at −∞."""
    logits_V = logits_V.clone()
    if 0 < top_k < logits_V.shape[-1]:
        kth = torch.topk(logits_V, top_k).values[-1]
        logits_V[logits_V < kth] = float("-inf")
    if top_p < 1.0:
        ordered, order = torch.sort(logits_V, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        # The likeliest stays, also where `top_p` is too small for fp32.
        logits_V[order[1:][before[1:] >= top_p]] = float("-inf")
    return logits_V
