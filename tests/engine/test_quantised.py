"""Weights in 8 bits: the error is that of rounding, and a row's result is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import local, make_decoder, reference_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.local import LocalEngine
from shoal.engine.model import Decoder, weight_bytes
from shoal.engine.quantised import QuantisedLinear
from shoal.engine.weights import to_views
from shoal.errors import ModelError

CPU = torch.device("cpu")


def make(weight: Tensor, bias: Tensor | None = None) -> QuantisedLinear:
    made = QuantisedLinear({"w": len(weight)}, weight.shape[1], bias=bias is not None, dtype=torch.float32, device=CPU)
    made.load({"w.weight": weight} | ({} if bias is None else {"w.bias": bias}))
    return made


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), outputs=st.integers(1, 40), inputs=st.integers(2, 70), seed=st.integers(0, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)  # fmt: skip
def test_the_error_is_at_most_that_of_rounding(rows: int, outputs: int, inputs: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        torch.randn(outputs, inputs, generator=generator),
        scale * torch.randn(rows, inputs, generator=generator),
    )
    bias = torch.randn(outputs, generator=generator)
    step_x, step_w = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1) / 127
    # |ab - a'b'| ≤ |a| |b - b'| + |b'| |a - a'|, summed over the inputs
    bound = x.abs().sum(1, keepdim=True) * step_w / 2 + (weight.abs() + step_w[:, None] / 2).sum(1) * step_x / 2
    error = (make(weight, bias)(x).double() - (x.double() @ weight.double().T + bias)).abs()
    assert bool((error <= bound * 1.001 + 1e-5 * (1 + scale)).all())


def test_a_rows_result_does_not_depend_on_the_others() -> None:
    linear = make(torch.randn(33, 48))
    x = torch.randn(5, 1, 48) * torch.tensor([1.0, 100.0, 1e-3, 0.0, 1.0])[:, None, None]
    whole = linear(x)
    assert whole.shape == (5, 1, 33)
    for row in range(5):
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1])
    assert not whole[3].any()


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(2, 8)
    x[0, 3] = float("nan")
    found = make(torch.randn(4, 8))(x)
    assert found[0].isnan().all() and not found[1].isnan().any()


def test_a_model_in_8_bits_is_near_the_model(plain: Path, plain_reference: object) -> None:
    model = local(plain)
    decoder = Decoder(model.config(), torch.float32, CPU, int8=True)
    decoder.load(model.tensors())
    ids = list(range(20, 70))
    arch = decoder.arch
    cache = KVCache(arch.num_layers, arch.num_kv_heads, arch.head_dim, 1, 1 << 20, torch.float32, CPU)
    cache.reserve(1, len(ids), 0)
    ours = decoder.logits(decoder.forward(torch.tensor([ids]), torch.tensor([0]), cache)[0])
    theirs = reference_logits(plain_reference, ids)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert weight_bytes(model.config(), 4, int8=True) < weight_bytes(model.config(), 4) / 2
    assert (
        weight_bytes(model.config(), 4)
        == 4 * sum(shape.numel() for shape in map(torch.Size, make_decoder(plain).shapes.values()))
        + 4 * arch.vocab_size * arch.hidden_size
    )


async def test_it_takes_no_policys_weights(plain: Path) -> None:
    model = local(plain)
    async with LocalEngine(model, dtype="fp32", device="cpu", context_tokens=256, int8=True) as engine:
        with pytest.raises(ModelError, match="8 bits"):
            await engine.load_weights(1, to_views(model.tensors()))
        assert engine.version == 0
