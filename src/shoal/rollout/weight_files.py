"""Tensors as one safetensors file, written from their bytes as they are: for engines that read weights from a disk.

    8 bytes: length of the header │ header: JSON, name -> dtype, shape, place │ the tensors' bytes, one after the other

Invariants: nothing is converted or copied; a reader sees the file whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from shoal.broadcast.tensors import TensorView
from shoal.errors import StorageError

ALIGNMENT = 8
"""The tensors begin at a multiple of this, so that the file can be mapped into memory."""


def write_weights(path: Path, tensors: Mapping[str, TensorView]) -> None:
    """Write a version's tensors to `path`, in place of what was there.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """
    places: dict[str, object] = {}
    at = 0
    for name, view in tensors.items():
        places[name] = {
            "dtype": view.dtype,
            "shape": list(view.shape),
            "data_offsets": [at, at + view.num_bytes],
        }
        at += view.num_bytes
    header = json.dumps(places).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    unfinished = path.with_suffix(".part")
    try:
        with unfinished.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for view in tensors.values():
                file.write(view.data)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a disk that is read-only not even that can be done
            unfinished.unlink(missing_ok=True)
        raise StorageError(f"weights cannot be written to {path}: {error.strerror}.", "Free some space.") from None
