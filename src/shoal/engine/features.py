"""Hidden states from inside a pass, for a drafter that reads them, and what a pass over drafts gives.

Shapes: B rows, T tokens a row, H hidden size, F = H times the number of depths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Features:
    """Gathers, during one pass, the hidden states that enter some layers; `Decoder.forward` takes it as `observe`.

    Args:
        depths: the layers.
    """

    def __init__(self, depths: tuple[int, ...]) -> None:
        self.depths = depths
        self._seen: dict[int, Tensor] = {}

    def __call__(self, layer: int, hidden_BTH: Tensor) -> None:
        if layer in self.depths:
            self._seen[layer] = hidden_BTH

    def each(self) -> list[Tensor]:
        """One after another, [B, T, H] each."""
        return [self._seen[depth] for depth in self.depths]

    def rows(self) -> Tensor | None:
        """Side by side, [B, T, F]; nothing where no depth was asked for."""
        return torch.cat(self.each(), dim=-1) if self.depths else None


@dataclass(frozen=True)
class Passed:
    """A pass that has come back."""

    hidden_BTH: Tensor
    features_BTF: Tensor | None
    compute_s: float
    """Of all stages."""
    slowest_s: float = 0.0
    """Of the slowest stage."""
    delay_s: float = 0.0
    """What the links between them took."""
