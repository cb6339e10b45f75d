"""What the losses share: their inputs, the clipped surrogate, the KL penalty, and the raw statistics of a step.

Words: π is the policy being trained, μ the behaviour policy that sampled the tokens (its log-probabilities come with
the episodes), π_prox the policy at the start of the step, ref the reference of the KL penalty.

Invariant: at most one clipped ratio and one truncated weight enter a loss, and they never both compare π with μ:
either ρ = π/μ is clipped, or ρ = π/π_prox is clipped and min(π_prox/μ, C) is a weight without gradient.

Shapes: N trained tokens of a micro-batch, S sequences they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.config.learner import CustomLoss, GrpoLoss, GspoLoss, ProximalImportance


@dataclass(frozen=True)
class TokenInputs:
    """The trained tokens of one micro-batch; all [N]."""

    logprobs: Tensor
    """log π, with gradient, fp32."""
    behaviour: Tensor
    """log μ, fp32."""
    advantages: Tensor
    weights: Tensor
    """From `token_weights`: the normalisation of the whole step."""
    sequence: Tensor
    """int64: which of the micro-batch's sequences a token belongs to, in 0 … S - 1."""
    num_sequences: int
    proximal: Tensor | None = None
    """log π_prox; absent: π itself without gradient, which it is when a batch makes one optimizer step."""
    reference: Tensor | None = None
    """log ref; needed with `kl_beta` > 0."""


@dataclass(frozen=True)
class RatioStats:
    """Sums over tokens, so that micro-batches add up. Ratios are the raw π/μ of single tokens, before any clip."""

    tokens: int = 0
    ratio_sum: float = 0.0
    ratio_max: float = 0.0
    ratio_min: float = float("inf")
    clipped: float = 0.0
    """Tokens whose gradient the clip removed."""
    k1_sum: float = 0.0
    """log μ - log π."""
    k3_sum: float = 0.0
    """π/μ - 1 - log(π/μ): an unbiased, non-negative estimate of KL(μ || π) (Schulman 2020)."""
    entropy_sum: float = 0.0
    reference_k3_sum: float = 0.0
    """The k3 estimate of KL(π || ref), where there is a reference."""

    def __add__(self, other: RatioStats) -> RatioStats:
        return RatioStats(
            self.tokens + other.tokens,
            self.ratio_sum + other.ratio_sum,
            max(self.ratio_max, other.ratio_max),
            min(self.ratio_min, other.ratio_min),
            self.clipped + other.clipped,
            self.k1_sum + other.k1_sum,
            self.k3_sum + other.k3_sum,
            self.entropy_sum + other.entropy_sum,
            self.reference_k3_sum + other.reference_k3_sum,
        )


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the step's loss (scalar, with gradient) and its raw statistics."""

    loss: Tensor
    stats: RatioStats


def importance(inputs: TokenInputs, settings: GrpoLoss | GspoLoss) -> tuple[Tensor, Tensor | None]:
    """The log-ratio to clip (with gradient) and the weight of truncated importance sampling, or None; both [N]."""
    if not isinstance(settings.importance, ProximalImportance):
        return inputs.logprobs - inputs.behaviour, None
    proximal = inputs.logprobs.detach() if inputs.proximal is None else inputs.proximal
    weight = torch.exp(proximal - inputs.behaviour).clamp(max=settings.importance.cap)
    return inputs.logprobs - proximal, weight


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float, delta: float | None
) -> tuple[Tensor, Tensor]:
    """-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A), and where the clip removed the gradient (bool).

    With `delta` the first ρ is capped at δ as well: else a negative advantage has no bound (INTELLECT-2's two-sided
    clip, arXiv 2505.07291).
    """
    clipped = torch.clamp(ratio, 1 - eps_low, 1 + eps_high)
    free = ratio if delta is None else torch.clamp(ratio, max=delta)
    loss = -torch.min(free * advantages, clipped * advantages)
    raw = ratio.detach()
    removed = ((raw < 1 - eps_low) & (advantages < 0)) | ((raw > 1 + eps_high) & (advantages > 0))
    if delta is not None:
        removed |= (raw > delta) & (advantages < 0)
    return loss, removed


def reduce(
    inputs: TokenInputs,
    losses: Tensor,
    removed: Tensor,
    settings: GrpoLoss | GspoLoss | CustomLoss,
    tis_weight: Tensor | None,
    entropy: Tensor | None,
) -> LossOutput:
    """Weigh per-token losses, add β·k3 of KL(π || ref), sum with the step's weights, and gather statistics."""
    if tis_weight is not None:
        losses = losses * tis_weight
    if settings.kl_beta > 0:
        assert inputs.reference is not None, "kl_beta > 0 needs the reference's log-probabilities"
        losses = losses + settings.kl_beta * _k3(inputs.reference - inputs.logprobs)
    return LossOutput((losses * inputs.weights).sum(), statistics(inputs, removed, entropy))


@torch.no_grad()
def statistics(inputs: TokenInputs, removed: Tensor, entropy: Tensor | None) -> RatioStats:
    """The raw statistics of one micro-batch."""
    if inputs.logprobs.numel() == 0:
        return RatioStats()
    log_ratio = (inputs.logprobs - inputs.behaviour).double()
    ratio = log_ratio.exp()
    reference = inputs.reference
    return RatioStats(
        tokens=ratio.numel(),
        ratio_sum=float(ratio.sum()),
        ratio_max=float(ratio.max()),
        ratio_min=float(ratio.min()),
        clipped=float(removed.sum()),
        k1_sum=float(-log_ratio.sum()),
        k3_sum=float(_k3(log_ratio).sum()),
        entropy_sum=0.0 if entropy is None else float(entropy.double().sum()),
        reference_k3_sum=0.0 if reference is None else float(_k3(reference - inputs.logprobs).double().sum()),
    )


def _k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r, of samples from the denominator's policy: estimates KL(denominator || numerator)."""
    return torch.exp(log_ratio) - 1 - log_ratio
