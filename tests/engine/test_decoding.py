"""Decoding by compiled kernels beside torch: the same numbers, row by row, whatever lies in the cache behind a row."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import ARCHITECTURES, VOCABULARY, make_cache, make_checkpoint, make_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine import kernels
from shoal.engine.decoding import as_array
from shoal.engine.features import Features
from shoal.engine.model import attend
from shoal.engine.rotary import rotate

GROUP, KV_HEADS, DIM = 3, 2, 8
HEADS = GROUP * KV_HEADS
ATTEND = kernels.make_attend(GROUP, DIM)
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def attended(
    dtype: torch.dtype, starts: list[int], width: int, capacity: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result, torch's, and the kernel's cache less torch's."""
    torch.manual_seed(seed)
    batch = len(starts)
    qkv = torch.randn(batch, width, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    angles = torch.randn(batch, width, DIM // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    keys, values = torch.randn(2, batch, KV_HEADS, capacity, DIM).to(dtype).unbind()
    start = torch.tensor(starts)
    wanted_keys, wanted_values = keys.float(), values.float()
    turned = rotate(qkv[:, :, : HEADS + KV_HEADS].float(), *(x[:, :, None].float() for x in (cos, sin)))
    q, k = turned.split((HEADS, KV_HEADS), dim=2)
    for row, at in enumerate(starts):
        wanted_keys[row, :, at : at + width] = k[row].transpose(0, 1)
        wanted_values[row, :, at : at + width] = qkv[row, :, HEADS + KV_HEADS :].float().transpose(0, 1)
    seen = torch.arange(capacity) <= (start[:, None] + torch.arange(width))[..., None]
    bias = torch.zeros(batch, 1, width, capacity).masked_fill_(~seen[:, None], -math.inf)
    wanted = attend(q, wanted_keys, wanted_values, bias).view(batch, width, HEADS, DIM)
    out = torch.empty(batch, width, HEADS, DIM, dtype=dtype)
    ATTEND(
        as_array(qkv), as_array(cos), as_array(sin), as_array(keys), as_array(values),
        start.numpy(), np.float32(DIM**-0.5), as_array(out),
    )  # fmt: skip
    differ = torch.cat((keys.float() - wanted_keys, values.float() - wanted_values), dim=1)
    return out.float(), wanted, differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(starts=st.lists(st.integers(0, 40), min_size=1, max_size=5), width=st.integers(1, 5), seed=st.integers(0, 1000))
def test_attention_is_that_of_torch(dtype: torch.dtype, starts: list[int], width: int, seed: int) -> None:
    found, wanted, differ = attended(dtype, starts, width, 45 + seed % 3, seed)
    assert (found - wanted).abs().max() < ROUNDINGS[dtype]
    assert differ.abs().max() < ROUNDINGS[dtype], "the new keys and values are written, and nothing else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), size=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_norm_and_gate_are_those_of_torch(dtype: torch.dtype, batch: int, size: int, scale: float) -> None:
    torch.manual_seed(size)
    hidden, x, weight = (torch.randn(shape).mul_(scale).to(dtype) for shape in ((batch, size), (batch, size), (size,)))
    total = hidden + x
    wanted = F.rms_norm(total.float(), (size,), weight.float(), 1e-5)
    out = torch.empty_like(hidden)
    kernels.add_norm(as_array(hidden), as_array(x), as_array(weight), np.float32(1e-5), as_array(out))
    assert torch.equal(hidden, total)
    torch.testing.assert_close(out.float(), wanted, rtol=ROUNDINGS[dtype], atol=1e-5)
    gate_up = torch.randn(batch, 2 * size).mul_(scale).to(dtype)
    gated = torch.empty(batch, size, dtype=dtype)
    kernels.gate(as_array(gate_up), as_array(gated))
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(gated.float(), F.silu(gate) * up, rtol=ROUNDINGS[dtype], atol=1e-6)


def test_exponentials_are_right_over_their_range() -> None:
    gates = torch.linspace(-120, 120, 4001)
    out = torch.empty(1, 4001)
    kernels.gate(torch.cat((gates, torch.ones(4001)))[None].numpy(), out.numpy())
    torch.testing.assert_close(out[0], F.silu(gates), rtol=2e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_no_number_stays_so_and_alone(dtype: torch.dtype) -> None:
    hidden = torch.ones(2, 16, dtype=dtype)
    hidden[1, 3] = math.nan
    out = torch.empty_like(hidden)
    kernels.add_norm(as_array(hidden), as_array(torch.zeros_like(hidden)), as_array(torch.ones(16, dtype=dtype)),
                     np.float32(1e-5), as_array(out))  # fmt: skip
    assert out[0].isfinite().all() and out[1].isnan().all()
    gated = torch.empty(2, 8, dtype=dtype)
    kernels.gate(as_array(hidden), as_array(gated))
    assert gated[0].isfinite().all() and gated[1, 3].isnan()
    qkv = torch.ones(2, 1, HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
    qkv[1] = math.nan
    flat, store = torch.ones(2, 1, DIM, dtype=dtype), torch.zeros(2, 2, KV_HEADS, 8, DIM, dtype=dtype)
    mixed = torch.empty(2, 1, HEADS, DIM, dtype=dtype)
    ATTEND(
        as_array(qkv), as_array(flat), as_array(flat), as_array(store[0]), as_array(store[1]),
        np.array([3, 3]), np.float32(1), as_array(mixed),
    )  # fmt: skip
    assert mixed[0].isfinite().all() and mixed[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_decodes_as_its_general_pass_does(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(make_checkpoint(tmp_path / "model", architecture), dtype)
    assert decoder._decodes
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 12))
    lengths = torch.tensor([11, 4, 7])
    found = []
    for compiled in (False, True):
        monkeypatch.setattr(decoder, "_decodes", compiled)
        cache = make_cache(decoder)
        cache.reserve(4, 32, 0)
        decoder.forward(ids.repeat(1, 2), torch.zeros(3, dtype=torch.int64), cache, first_slot=1)
        seen = Features(tuple(range(len(decoder._layers))))
        hidden = [decoder.forward(ids[:, :1], lengths + step, cache, first_slot=1, observe=seen) for step in range(3)]
        found.append([*hidden, *seen.each()])
    assert len(found[0]) == 3 + len(decoder._layers)
    for general, compiled in zip(*found, strict=True):
        assert general.shape == compiled.shape
        relative = (general.float() - compiled.float()).norm() / general.float().norm()
        assert relative < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("start", "first_slot"), [(31, 0), (-1, 0), (0, 4)])
def test_what_is_not_in_the_cache_is_not_touched(start: int, first_slot: int, plain: Path) -> None:
    """Two tokens at a cache of 4 rows of 32 positions; kernels themselves look at no bounds."""
    decoder = make_decoder(plain)
    cache = make_cache(decoder)
    cache.reserve(4, 32, 0)
    with pytest.raises(IndexError, match="not in the cache"):
        decoder.forward(torch.tensor([[5, 6]]), torch.tensor([start]), cache, first_slot=first_slot)


@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_kept() -> None:
    code = (
        "import numpy as n; from shoal.engine import kernels as k; o = n.ones((1, 2), 'f4')\n"
        "k.gate(n.zeros((1, 4), 'f4'), o); print(o.sum())"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": "/proc/nowhere"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert found.stdout.strip() == "0.0", found.stderr
