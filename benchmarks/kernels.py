"""The engine's choices in decoding, beside what they replace: compiled kernels between products, packed linear maps.

Shapes are the embedded model's (9 query heads, 3 key heads of 64; hidden 576, inner 1536), bf16, one thread. Variants
of a row alternate, so that a busy neighbour slows all; a time is the median, a ratio the median of the rounds' ratios.

    shoal bench kernels
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine import kernels
from shoal.engine.cache import KVCache
from shoal.engine.decoding import as_array
from shoal.engine.linear import Linear, can_pack
from shoal.engine.model import attend
from shoal.engine.rotary import rotate
from shoal.engine.sampling import _invert, sample
from shoal.protocol.sampling import SamplingParams

from _common import benchmark, emit

HEADS, KV_HEADS, DIM, HIDDEN, INNER = 9, 3, 64, 576, 1536
ROUNDS, CALLS = 15, 20


LAYERS = 30
"""Caches that a step goes through, so that none is still in the processor's when it is read again."""


def general(qkv: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int, at: Tensor, bias: Tensor) -> Tensor:
    """As the engine's pass for any number of new tokens does it: plain products of small matrices."""
    q, k = rotate(qkv[:, :, : HEADS + KV_HEADS], cos, sin).split((HEADS, KV_HEADS), dim=2)
    keys, values = cache.write(layer, 0, at, k, qkv[:, :, HEADS + KV_HEADS :], bias.shape[-1])
    return attend(q, keys, values, bias)


def fused(qkv: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int, at: Tensor, bias: Tensor) -> Tensor:
    """torch's fused kernel, the query heads of a key head as rows of one query."""
    q, k = rotate(qkv[:, :, : HEADS + KV_HEADS], cos, sin).split((HEADS, KV_HEADS), dim=2)
    keys, values = cache.write(layer, 0, at, k, qkv[:, :, HEADS + KV_HEADS :], bias.shape[-1])
    rows = q.reshape(len(q), KV_HEADS, HEADS // KV_HEADS, DIM)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias).reshape(len(q), 1, -1)


def attention(batch: int, reach: int) -> dict[str, Callable[[], Tensor]]:
    """Rotation, the cache and attention of one layer, another one at each call."""
    kernel = kernels.make_attend(HEADS // KV_HEADS, DIM)
    cpu = torch.device("cpu")
    cache = KVCache(LAYERS, KV_HEADS, DIM, batch, 1 << 34, torch.bfloat16, cpu)
    cache.reserve(batch, reach, 0)
    for layer in range(LAYERS):
        for store in cache.rows_of(layer, 0, batch):
            store.normal_()
    qkv = torch.randn(batch, 1, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)
    angles = torch.randn(batch, 1, 1, DIM // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1).bfloat16()
    sin = torch.cat((-angles.sin(), angles.sin()), -1).bfloat16()
    at = torch.full((batch, 1), reach - 1)
    bias = torch.zeros(batch, 1, 1, reach, dtype=torch.bfloat16)

    def compiled(layer: int) -> Tensor:
        out = torch.empty(batch, 1, HEADS, DIM, dtype=torch.bfloat16)
        keys, values = cache.rows_of(layer, 0, batch)
        arrays = (as_array(each) for each in (qkv, cos[:, :, 0], sin[:, :, 0], keys, values))
        kernel(*arrays, at[:, 0].numpy(), np.float32(DIM**-0.5), as_array(out))
        return out.view(batch, 1, -1)

    wanted = general(qkv, cos, sin, cache, 0, at, bias).float()
    for found in (fused(qkv, cos, sin, cache, 0, at, bias), compiled(0)):
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    turns = {name: itertools.cycle(range(LAYERS)) for name in ("compiled", "plain products", "fused, rows")}
    return {
        "compiled": lambda: compiled(next(turns["compiled"])),
        "plain products": lambda: general(qkv, cos, sin, cache, next(turns["plain products"]), at, bias),
        "fused, rows": lambda: fused(qkv, cos, sin, cache, next(turns["fused, rows"]), at, bias),
    }


def drawing(rows: int) -> dict[str, Callable[[], Tensor]]:
    """A token a row of a vocabulary of 49,152, with its log-probability; torch without that."""
    logits = (3 * torch.randn(rows, 49_152)).bfloat16()
    uniforms = torch.rand(rows, dtype=torch.float64).tolist()
    plain = [SamplingParams()] * rows

    def by_torch() -> Tensor:
        x = logits.to(torch.float32, copy=True)
        x -= x.amax(dim=-1, keepdim=True)
        return _invert(x.exp(), torch.tensor(uniforms, dtype=torch.float64))[0]

    return {"compiled": lambda: torch.tensor(sample(logits, plain, uniforms)[0]), "torch": by_torch}


def linear(rows: int) -> dict[str, Callable[[], Tensor]]:
    weight = torch.randn(2 * INNER, HIDDEN, dtype=torch.bfloat16)
    packed = Linear({"gate_up": 2 * INNER}, HIDDEN, bias=False, dtype=torch.bfloat16, device=torch.device("cpu"))
    packed.load({"gate_up.weight": weight})
    x = torch.randn(rows, 1, HIDDEN, dtype=torch.bfloat16)
    torch.testing.assert_close(packed(x), F.linear(x, weight), rtol=0.05, atol=0.5)
    return {"packed": lambda: packed(x), "torch": lambda: F.linear(x, weight)}


@torch.inference_mode()
def measure(variants: Mapping[str, Callable[[], Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by variant, and how many times longer each takes than the first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(ROUNDS + 1):
        for name, call in variants.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - started) / CALLS * 1e3)
    ours = next(iter(times.values()))
    ratios = {name: statistics.median(t / o for t, o in zip(each, ours, strict=True)) for name, each in times.items()}
    return {name: statistics.median(each) for name, each in times.items()}, ratios


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {
        f"attention, {batch} rows, {reach} positions": attention(batch, reach)
        for batch, reach in ((1, 100), (32, 91), (8, 400))
    }
    cases |= {f"draw, {rows} rows": drawing(rows) for rows in (1, 32)}
    if can_pack(torch.bfloat16, torch.device("cpu")):
        cases |= {f"linear, {rows} rows": linear(rows) for rows in (1, 32)}
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for case, variants in cases.items():
        milliseconds, ratios = measure(variants)
        rows += [
            {"case": case, "variant": name, "ms": milliseconds[name], "over_ours": ratios[name]} for name in variants
        ]
        best_peer = min(ratio for name, ratio in ratios.items() if name != next(iter(variants)))
        headline[case.replace(", ", "_").replace(" ", "_") + "_speedup"] = best_peer
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
