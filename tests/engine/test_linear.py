"""A matrix of several checkpoint parts, packed or not, multiplies like `F.linear` and takes new values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.engine.linear import Linear, can_pack

CPU = torch.device("cpu")
PARTS = {"a": 40, "b": 24}


def values(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"a.weight": (40, 48), "b.weight": (24, 48), "a.bias": (40,), "b.bias": (24,)}
    return {f"layer.{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_multiplies_and_can_be_reloaded(dtype: torch.dtype, bias: bool) -> None:
    linear = Linear(PARTS, 48, bias=bias, dtype=dtype, device=CPU)
    assert set(linear.shapes()) == {"a.weight", "b.weight"} | ({"a.bias", "b.bias"} if bias else set())
    with torch.inference_mode():
        for seed in (0, 1, 0):
            given = values(dtype, seed)
            linear.load(given, "layer.")
            weight = torch.cat([given["layer.a.weight"], given["layer.b.weight"]])
            b = torch.cat([given["layer.a.bias"], given["layer.b.bias"]]) if bias else None
            for shape in ((1, 48), (33, 48), (2, 5, 48)):
                x = torch.randn(shape).to(dtype)
                want = F.linear(x.float(), weight.float(), None if b is None else b.float())
                tolerance = 1e-5 if dtype == torch.float32 else 0.02
                torch.testing.assert_close(linear(x).float(), want, rtol=tolerance, atol=10 * tolerance)


def test_the_given_values_are_not_kept() -> None:
    """What a snapshot's memory holds may change after the swap."""
    for dtype in (torch.float32, torch.bfloat16):
        linear = Linear(PARTS, 48, bias=True, dtype=dtype, device=CPU)
        given = values(dtype, 0)
        with torch.inference_mode():
            linear.load(given, "layer.")
            x = torch.randn(3, 48).to(dtype)
            before = linear(x)
            for tensor in given.values():
                tensor.zero_()
            assert torch.equal(linear(x), before)


def test_only_bf16_on_a_cpu_is_packed() -> None:
    assert not can_pack(torch.float32, CPU)
    assert not can_pack(torch.bfloat16, torch.device("meta"))
