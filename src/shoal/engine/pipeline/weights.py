"""A checkpoint's tensors, given out in pieces and put together again: a stage fetches its own layers' and no others.

Invariants: nothing is given out but what the checkpoint has under that name; a tensor is taken only if it has the shape
that the model needs, and its pieces exactly its bytes. Who gave them is the caller's to know: requests are signed.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.broadcast.tensors import TensorView, view_of
from shoal.engine.source import LocalModel
from shoal.engine.weights import from_views, to_views
from shoal.errors import RecordError
from shoal.protocol.snapshot import DType
from shoal.protocol.stage import MAX_TENSOR_PIECE_BYTES, TensorPiece, TensorRequest

FETCHES_AT_ONCE = 4

FLOATS: dict[str, tuple[DType, int]] = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2)}
"""What weights come as, and bytes of a value."""

Ask = Callable[[TensorRequest], Awaitable[TensorPiece]]


class Shelf:
    """Gives out tensors: of the checkpoint (version 0), and of what takes its place."""

    def __init__(self, model: LocalModel) -> None:
        self._versions: dict[int, Mapping[str, TensorView]] = {0: to_views(model.tensors())}

    def put(self, version: int, views: Mapping[str, TensorView]) -> None:
        """Have one more version."""
        self._versions[version] = views

    def keep(self, version: int) -> None:
        """Have this version only."""
        self._versions = {version: self._versions[version]}

    def piece(self, request: TensorRequest) -> TensorPiece:
        """Bytes from the offset on.

        Raises:
            RecordError: there is no such tensor.
        """
        view = self._versions.get(request.version, {}).get(request.name)
        if view is None:
            raise RecordError(f"there is no tensor '{request.name[:100]}' of version {request.version}.")
        data = bytes(view.data[request.offset : request.offset + MAX_TENSOR_PIECE_BYTES])
        return TensorPiece(dtype=view.dtype, shape=view.shape, total=view.num_bytes, data=data)


async def fetch(ask: Ask, shapes: Mapping[str, tuple[int, ...]], version: int = 0) -> dict[str, Tensor]:
    """The tensors of these names, of a version.

    Raises:
        RecordError: one is not what it should be.
        NetworkError: whoever is asked is gone.
    """
    places = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def one(name: str, shape: tuple[int, ...]) -> Tensor:
        async with places:
            return await _fetch_one(ask, name, shape, version)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(one(name, shape)) for name, shape in shapes.items()}
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {name: task.result() for name, task in tasks.items()}


async def _fetch_one(ask: Ask, name: str, shape: tuple[int, ...], version: int) -> Tensor:
    data = bytearray()
    while True:
        piece = await ask(TensorRequest(name=name, offset=len(data), version=version))
        dtype, value_bytes = FLOATS.get(piece.dtype, (None, 0))
        if dtype is None or piece.shape != shape or piece.total != math.prod(shape) * value_bytes:
            raise RecordError(f"tensor '{name}' comes as {piece.dtype}{list(piece.shape)}, not as {list(shape)}.")
        data += piece.data
        if len(data) > piece.total or not piece.data:
            raise RecordError(f"tensor '{name}' comes with the wrong number of bytes.")
        if len(data) == piece.total:
            return from_views({name: view_of(dtype, shape, memoryview(data))})[name]


def chosen(model: LocalModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The same from a checkpoint on this disk; what is missing, `Decoder.load` says."""
    found = model.tensors()
    return {name: found[name] for name in shapes if name in found}


def config_of(text: bytes) -> Any:
    """The `transformers` configuration that a `config.json` describes; raises `ModelError` where it is none."""
    with tempfile.TemporaryDirectory(prefix="shoal-stage-") as folder:
        (Path(folder) / "config.json").write_bytes(text)
        return LocalModel("the requester's model", Path(folder)).config()
