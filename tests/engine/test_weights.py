"""Tensors become views and views become tensors, bit for bit, without copies where none is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.broadcast.tensors import view_of
from shoal.engine.weights import _TORCH, from_views, to_views
from shoal.protocol.snapshot import DTYPE_BYTES


def test_every_type_of_the_protocol_is_known() -> None:
    assert set(_TORCH) == set(DTYPE_BYTES)
    assert all(dtype.itemsize == DTYPE_BYTES[name] for name, dtype in _TORCH.items())


@given(st.sampled_from(sorted(_TORCH)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31))
def test_round_trip(name: str, shape: list[int], seed: int) -> None:
    dtype = _TORCH[name]  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    tensor = bits.to(torch.uint8).view(dtype).reshape(shape)
    views = to_views({"a": tensor})
    assert (views["a"].dtype, views["a"].shape) == (name, tuple(shape))
    assert views["a"].num_bytes == tensor.numel() * dtype.itemsize
    back = from_views(views)["a"]
    assert back.dtype == dtype and back.shape == tensor.shape
    # Compared as bytes: some of them are NaN.
    assert bytes(to_views({"a": back})["a"].data) == bytes(views["a"].data)
    if tensor.numel():
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_bytes_are_little_endian_and_in_order() -> None:
    assert bytes(to_views({"a": torch.tensor([[1, 2], [3, 258]], dtype=torch.int16)})["a"].data) == bytes(
        [1, 0, 2, 0, 3, 0, 2, 1]
    )
    assert from_views({"a": view_of("F32", (1,), b"\x00\x00\x80\x3f")})["a"].item() == 1.0


def test_memory_is_shared_where_it_can_be() -> None:
    tensor = torch.arange(6.0)
    view = to_views({"a": tensor})["a"]
    tensor[0] = 9
    assert from_views({"a": view})["a"][0] == 9
    turned = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(from_views(to_views({"a": turned}))["a"], turned)


def test_parameters_with_gradient_and_parts_of_a_chunk() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not from_views(to_views({"a": parameter}))["a"].requires_grad
    memory = memoryview(bytearray(b"\xff" + torch.tensor([1.5, -2.0]).numpy().tobytes()))
    assert from_views({"a": view_of("F32", (2,), memory[1:])})["a"].tolist() == [1.5, -2.0]
    with pytest.raises(AssertionError, match="bytes"):
        view_of("F32", (2,), b"1234567")
