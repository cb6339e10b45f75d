"""Tensors of a snapshot as torch tensors, and back, without copying where that is possible.

Invariant: bytes keep their meaning (dtype and shape as the manifest says, little-endian); nothing here runs code from
the bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.broadcast.tensors import TensorView, view_of
from shoal.protocol.snapshot import DType

_TORCH: dict[DType, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in _TORCH.items()}


def from_views(views: Mapping[str, TensorView]) -> dict[str, Tensor]:
    """Torch tensors over the views' memory; to be read, never written."""
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, view in views.items():
            if view.num_bytes == 0:
                found[name] = torch.empty(view.shape, dtype=_TORCH[view.dtype])
            else:
                found[name] = torch.frombuffer(view.data, dtype=_TORCH[view.dtype]).view(view.shape)
    return found


def to_views(tensors: Mapping[str, Tensor]) -> dict[str, TensorView]:
    """Views over the tensors' memory (copied only if they are not on the CPU or not contiguous)."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        data = memoryview(flat.reshape(-1).view(torch.uint8).numpy().data) if flat.numel() else b""
        found[name] = view_of(_NAMES[flat.dtype], tuple(flat.shape), data)
    return found
