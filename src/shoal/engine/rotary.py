"""Rotary position embedding (Su et al. 2021): the angle by which each pair of a head's coordinates is turned.

Frequencies, and any scaling of them, are those of `transformers`. Angles are computed for the positions at hand, in
fp32: a table for every position of a long context would be larger than a small model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.errors import ModelError

SCALED = ("linear", "llama3", "yarn")
"""Scalings whose frequencies don't depend on how long the sequence is at the moment."""


class Rotary:
    """Cosines and sines for one model.

    Args:
        config: its `transformers` configuration.
        head_dim: coordinates of a head, D.
    """

    def __init__(self, config: Any, head_dim: int, device: torch.device) -> None:
        frequencies, self._scale = _frequencies(config, head_dim)
        self._frequencies = frequencies.float().to(device)

    def angles(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for `rotate`, [B, T, 1, D] each."""
        angles = positions_BT[..., None, None] * self._frequencies
        cos, sin = (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [B, T, N, D]; coordinate i is paired with i + D/2, as in Hugging Face checkpoints."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position, [D/2], and the factor on cosines and sines.

    Raises:
        ModelError: a kind of rotary embedding that would be computed wrongly.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("rotary embedding of a part of each head is not supported.", "Use another model.")
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        theta = parameters.get("rope_theta", 10_000.0)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (theta**exponents), 1.0
    if kind not in SCALED:
        raise ModelError(f"rotary scaling '{kind}' is not supported.", f"Supported: default, {', '.join(SCALED)}.")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scale)
