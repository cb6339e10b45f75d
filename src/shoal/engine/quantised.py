"""A linear map in 8 bits, for serving on a CPU: half the memory of bf16, and products of small integers.

    y = (Σ_k a_k w_k) · s_x · s_w
    a = round(x / s_x), s_x = max |x| / 127 of a row;   w = round(W / s_w), s_w = max |W| / 127 of an output

Weights are rounded once, inputs row by row as they come: a row's result depends on that row alone, so what a request
draws does not depend on the batch. `shoal bench serving -- --only int8` measures speed and error.

Invariant: as in `linear`; rounding errs by at most half a step of each row's and each output's own scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.engine.linear import Linear
from shoal.errors import ModelError

STEPS = 127
SMALLEST = 1e-30
"""A row of zeros has some scale as well."""


class QuantisedLinear(Linear):
    """As `Linear`, with its weights in 8 bits."""

    def __init__(
        self, parts: Mapping[str, int], columns: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        if device.type not in ("cpu", "meta"):
            raise ModelError(f"weights of 8 bits are computed on a CPU only, not on {device}.", 'Use weights = "full".')
        super().__init__(parts, columns, bias=bias, dtype=dtype, device=torch.device("meta"))
        self._bias = torch.empty(sum(parts.values()), dtype=dtype, device=device) if bias else None
        self._scale_O = torch.empty(0)

    def load(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        plain_OH = torch.empty(sum(self._parts.values()), self._columns)
        self._gather(tensors, prefix, plain_OH)
        scale_O1 = plain_OH.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST) / STEPS
        self._weight = (plain_OH / scale_O1).round_().to(torch.int8)
        self._scale_O = scale_O1[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self._columns).float()
        scale_B1 = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST) / STEPS
        whole = torch._int_mm((rows / scale_B1).round_().to(torch.int8), self._weight.t())
        product = whole.float().mul_(scale_B1).mul_(self._scale_O).to(self._dtype)
        if self._bias is not None:
            product += self._bias
        return product.view(*x.shape[:-1], -1)
