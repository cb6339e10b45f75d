"""Tensors as a step's bytes: the values in order, little-endian, nothing else. What shape they have the header says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.errors import RecordError

TYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def to_bytes(tensor: Tensor) -> bytes:
    """The tensor's values."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def split_bytes(
    data: bytes, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[Tensor]:
    """Tensors that follow each other.

    Raises:
        RecordError: the bytes are more or fewer than theirs.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = from_bytes(data, dtype, (sum(sizes),), device)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of these values.

    Raises:
        RecordError: they are more or fewer.
    """
    expected = torch.Size(shape).numel() * dtype.itemsize
    if len(data) != expected:
        raise RecordError(f"a step's tensor has {len(data)} bytes instead of {expected}.")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape).to(device)
