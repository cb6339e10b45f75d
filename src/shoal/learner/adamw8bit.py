"""AdamW whose two moments are kept in 8 bits, a block of values at a time (Dettmers et al., arXiv 2110.02861).

1. The paper's dynamic-tree data type is replaced by a linear one of the value's root: m is kept as sign and √|m| in 127
   steps, v as its fourth root in 255 steps, each relative to the largest of its block. The roots spread the steps
   towards zero, where most values are. A v above zero never becomes zero: it is what a step is divided by.
2. Blocks hold 128 values, not 2048: a block's largest value hides less.
3. Values are rounded at random to one of their two neighbours, so that a change smaller than a step is kept on average
   and a moment does not stand still; the generator is seeded by step and position, so a resumed run is the same.

    m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²      w ← w − lr (m̂ / (√v̂ + ε) + λ w)

Invariants: the same gradients, state and step give the same weights, bit for bit on one device; a block of zeros stays
zero; the state is 2 bytes a value and two fp32 scales a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128

STATE_KEYS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")

PIECE_CPU, PIECE = 2**16, 2**24
"""Values that exist in fp32 at once, beside their weights: on a CPU as many as its cache holds."""


def state_shape(key: str, parameter: Tensor) -> torch.Size:
    """The shape of one of a parameter's `STATE_KEYS`."""
    blocks = -(-parameter.numel() // BLOCK)
    return torch.Size((blocks,) if key.endswith("_scale") else (blocks, BLOCK))


def quantise(values: Tensor, steps: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [N, BLOCK] of values in 0 … max as fp32 whole numbers in 0 … steps; and each block's largest value [N]."""
    largest = values.amax(dim=1)
    scaled = values / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None] * steps
    return scaled.add_(noise).floor_().clamp_(max=steps), largest


class AdamW8bit(torch.optim.Optimizer):
    """Takes the same parameters and groups as `torch.optim.AdamW`; fp32 parameters only."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not used."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        blocks = -(-parameter.numel() // BLOCK)
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device)
                state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=device)
            state["exp_avg"] += 127
        state["step"] += 1
        step = int(state["step"])
        noise = torch.Generator(parameter.device).manual_seed(step * 1_000_003 + number)
        weights, grads = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        piece = (PIECE_CPU if parameter.device.type == "cpu" else PIECE) // BLOCK
        for first in range(0, blocks, piece):
            rows = slice(first, min(first + piece, blocks))
            here = slice(first * BLOCK, min(rows.stop * BLOCK, parameter.numel()))
            weights[here] = self._piece(weights[here], grads[here], state, rows, group, step, noise)

    def _piece(
        self,
        weights: Tensor,
        grads: Tensor,
        state: dict[str, Tensor],
        rows: slice,
        group: dict[str, Any],
        step: int,
        noise: torch.Generator,
    ) -> Tensor:
        beta1, beta2 = group["betas"]
        size = (rows.stop - rows.start) * BLOCK
        grad = F.pad(grads.float(), (0, size - len(grads))).view(-1, BLOCK)
        dither = torch.rand(grad.shape, generator=noise, device=grad.device)
        signed = state["exp_avg"][rows].float().sub_(127)
        mean = signed.mul_(signed.abs()).mul_((state["exp_avg_scale"][rows, None] / 127) ** 2)
        mean.lerp_(grad, 1 - beta1)
        fourth = state["exp_avg_sq"][rows].float().mul_(state["exp_avg_sq_scale"][rows, None] / 255)
        root = fourth.square_().square_().mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sqrt_()
        steps, state["exp_avg_scale"][rows] = quantise(mean.abs().sqrt_(), 127, dither)
        state["exp_avg"][rows] = steps.copysign_(mean).add_(127).to(torch.uint8)
        steps, state["exp_avg_sq_scale"][rows] = quantise(root.sqrt(), 255, dither)
        state["exp_avg_sq"][rows] = torch.maximum(steps, (root > 0).float()).to(torch.uint8)
        # The step is taken with the moments before they are rounded: what rounding costs comes through the state alone.
        move = mean.div_(root.div_((1 - beta2**step) ** 0.5).add_(group["eps"])).view(-1)[: len(weights)]
        kept = weights * (1 - group["lr"] * group["weight_decay"])
        return kept.sub_(move, alpha=group["lr"] / (1 - beta1**step))
