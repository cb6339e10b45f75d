"""A linear map in the layout in which this machine multiplies fastest; its values are replaced when weights change.

Several checkpoint matrices over the same input (q, k and v; gate and up) are the rows of one. On a CPU that has bf16
instructions the matrix is kept packed by oneDNN; otherwise every product would first re-order it (`shoal bench
kernels` times both). The results are the same.

Invariant: after `load` every part has the new values; the caller has checked names and shapes before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

PACKING_ROWS = 32
"""Rows of input that the packed layout is chosen for; with oneDNN 3 it came out the same for 1 to 256."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies packed matrices of this type here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Linear:
    """x Wᵀ + b.

    Args:
        parts: checkpoint name (without `.weight`) -> how many rows of W it gives, in order.
        columns: width of the input.
        bias: whether each part has a `.bias`.
    """

    def __init__(
        self, parts: Mapping[str, int], columns: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parts = dict(parts)
        self._columns = columns
        self._dtype, self._device = dtype, device
        rows = sum(parts.values())
        self._packs = can_pack(dtype, device)
        self._weight = torch.empty(0) if self._packs else torch.empty(rows, columns, dtype=dtype, device=device)
        self._bias = torch.empty(rows, dtype=dtype, device=device) if bias else None

    @property
    def parts(self) -> Mapping[str, int]:
        """Checkpoint names and their rows, in order."""
        return self._parts

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self._columns

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint tensors that `load` takes."""
        found: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (rows, self._columns) for name, rows in self._parts.items()
        }
        if self._bias is not None:
            found |= {f"{name}.bias": (rows,) for name, rows in self._parts.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Take the values of all parts, each found under `prefix` + its name."""
        plain = (
            torch.empty(sum(self._parts.values()), self._columns, dtype=self._dtype) if self._packs else self._weight
        )
        self._gather(tensors, prefix, plain)
        if self._packs:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(plain, PACKING_ROWS)

    def _gather(self, tensors: Mapping[str, Tensor], prefix: str, into: Tensor) -> None:
        """Copy the parts' matrices one below the other, and take their biases."""
        start = 0
        for name, rows in self._parts.items():
            into[start : start + rows].copy_(tensors[f"{prefix}{name}.weight"])
            if self._bias is not None:
                self._bias[start : start + rows].copy_(tensors[f"{prefix}{name}.bias"])
            start += rows

    def __call__(self, x: Tensor) -> Tensor:
        if self._packs:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return F.linear(x, self._weight, self._bias)
