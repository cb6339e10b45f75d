"""AdamW on fp32 master weights, whatever the model computes in.

A bf16 weight near 1 can't take a step smaller than 0.4 %; Adam's steps at a learning rate of 1e-5 are a thousand times
smaller. So the optimizer owns an fp32 copy of every bf16 weight, moves that, and rounds it back. Gradients of
micro-batches are summed in fp32 as well. For an fp32 model the masters *are* the weights and all of this is
`torch.optim.AdamW`.

1. Weight decay acts on matrices only; norms and biases are left out, as is usual.
2. Of a parameter in parts (`sharding`) each rank moves its own; only the gradient's norm is over all of them.

Invariants: after `step` the model holds its masters, rounded; a gradient that is not finite changes nothing at all;
`load_state_dict(state_dict())` continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.config.learner import LrSchedule
from shoal.errors import RecordError
from shoal.learner.adamw8bit import STATE_KEYS, AdamW8bit, state_shape
from shoal.learner.parts import own_part


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimizer moves: the weight itself where it is fp32 (in parts: this rank's), a copy otherwise."""
    if parameter.dtype != torch.float32:
        return parameter.detach().float()
    return parameter if own_part(parameter) is parameter else own_part(parameter).detach()


def learning_rate(
    peak: float, warmup_steps: int, step: int, *, schedule: LrSchedule = "constant", total_steps: int = 0
) -> float:
    """The rate of one step, counted from 0.

    Linear warm-up: step 0 takes peak / warmup_steps, step warmup_steps - 1 the peak. Then, with x rising from 0 there
    to 1 at `total_steps` (the first step that is not taken): `constant` 1, `linear` 1 - x, `cosine` (1 + cos πx) / 2 of
    the peak. So the last step still moves, and a run that is longer than was said stands still.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    x = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps + 1 - warmup_steps))
    return peak * ((1 - x) if schedule == "linear" else (1 + math.cos(math.pi * x)) / 2)


@dataclass(frozen=True)
class OptimizerStep:
    """What a step did: the gradient's global norm before clipping, and whether the weights moved."""

    grad_norm: float
    applied: bool


class MasterAdamW:
    """AdamW over named parameters.

    Args:
        parameters: name -> parameter; those of a lower precision than fp32 get a master copy.
        betas, eps, weight_decay: AdamW's (Loshchilov and Hutter 2019).
        grad_clip: largest global gradient norm; larger ones are scaled down to it.
        kind: `adamw8bit` keeps the two moments in 8 bits (`learner.adamw8bit`).
        total_norm: the norm of the whole gradient from that of this process's part.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_clip: float,
        kind: Literal["adamw", "adamw8bit"] = "adamw",
        total_norm: Callable[[float], float] = float,
    ) -> None:
        self._parameters = dict(parameters)
        self._masters = {name: _master(p) for name, p in self._parameters.items()}
        self._copied = {name for name, p in self._parameters.items() if p.dtype != torch.float32}
        """Those whose master is not the weight itself."""
        self._total_norm = total_norm
        self._buffers: dict[str, Tensor] = {}
        self._grad_clip = grad_clip
        matrices = [m for m in self._masters.values() if m.ndim >= 2]
        others = [m for m in self._masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self._adam: torch.optim.Optimizer
        if kind == "adamw":
            self._adam = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
            self._state_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        else:
            self._adam = AdamW8bit(groups, betas=betas, eps=eps)
            self._state_keys = STATE_KEYS

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of one backward pass to the step's sum, in fp32, and free them."""
        for name, parameter in self._parameters.items():
            master, grad = self._masters[name], parameter.grad
            if master is parameter or grad is None:
                continue
            grad = own_part(grad)
            if master.grad is None:
                # Buffers outlive the step: fresh pages for all gradients cost more than the copy.
                buffer = self._buffers.setdefault(name, torch.empty_like(master))
                master.grad = buffer.copy_(grad)
            else:
                master.grad.add_(grad)
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> OptimizerStep:
        """Clip, move the masters, round them into the model, forget the gradients."""
        masters = list(self._masters.values())
        grads = [m.grad for m in masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        grad_norm = self._total_norm(float(norm))
        applied = math.isfinite(grad_norm) and bool(grads)
        if applied:
            if grad_norm > self._grad_clip:
                torch._foreach_mul_(grads, self._grad_clip / grad_norm)
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            for name in self._copied:
                self._parameters[name].copy_(self._masters[name])
        self.zero_grad()
        return OptimizerStep(grad_norm, applied)

    def _dtype_of(self, key: str) -> torch.dtype:
        in_bytes = self._state_keys == STATE_KEYS and key in ("exp_avg", "exp_avg_sq")
        return torch.uint8 if in_bytes else torch.float32

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Flat, for safetensors: `master.NAME` (where it is not the weight itself), `exp_avg.NAME`, …, `step.NAME`."""
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if name in self._copied:
                state[f"master.{name}"] = master
            for key, value in self._adam.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`; the model's weights are set from the masters.

        Raises:
            RecordError: a tensor is missing, unknown, or has another shape.
        """
        expected = set()
        for name in self._masters:
            if name in self._copied:
                expected.add(f"master.{name}")
            if f"step.{name}" in state:
                expected |= {f"{key}.{name}" for key in ("step", *self._state_keys)}
        if expected != set(state):
            odd = sorted(expected ^ set(state))
            raise RecordError(f"the optimizer state does not fit the model: {odd[0]} is missing or unknown.")
        for name, master in self._masters.items():
            for key in ("master", *self._state_keys):
                tensor = state.get(f"{key}.{name}")
                shape = master.shape if self._state_keys != STATE_KEYS or key == "master" else state_shape(key, master)
                if tensor is not None and tensor.shape != shape:
                    raise RecordError(f"optimizer tensor {key}.{name} has shape {tuple(tensor.shape)}.")
        self._adam.state.clear()
        for name, master in self._masters.items():
            if name in self._copied:
                master.copy_(state[f"master.{name}"])
                self._parameters[name].copy_(master)
            if f"step.{name}" in state:
                self._adam.state[master] = {
                    key: state[f"{key}.{name}"].to(device=master.device, dtype=self._dtype_of(key), copy=True)
                    for key in ("step", *self._state_keys)
                }
        self.zero_grad()
