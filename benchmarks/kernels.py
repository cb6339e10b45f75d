"""The engine's two choices in decoding, beside what they replace: attention for one new token, packed linear maps.

Shapes are the embedded model's (9 query heads, 3 key heads of 64; hidden 576, inner 1536), bf16, one thread. Variants
of a row alternate, so that a busy neighbour slows all; a time is the median, a ratio the median of the rounds' ratios.

    shoal bench kernels
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.linear import Linear, can_pack
from shoal.engine.model import attend

from _common import benchmark, emit

HEADS, KV_HEADS, DIM, HIDDEN, INNER = 9, 3, 64, 576, 1536
ROUNDS, CALLS = 15, 20


def attention_as_fused(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """torch's fused kernel, told that heads are grouped."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(q.shape[0], 1, -1)


def attention_as_rows(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """torch's fused kernel, the query heads of a key head as rows of one query."""
    batch, group = q.shape[0], HEADS // KV_HEADS
    rows = q.view(batch, KV_HEADS, group, DIM)
    mixed = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias)
    return mixed.reshape(batch, 1, -1)


def attention(batch: int, reach: int) -> dict[str, Callable[[], Tensor]]:
    q = torch.randn(batch, 1, HEADS, DIM, dtype=torch.bfloat16)
    keys, values = torch.randn(2, batch, KV_HEADS, reach, DIM, dtype=torch.bfloat16)
    bias = torch.zeros(batch, 1, 1, reach, dtype=torch.bfloat16)
    variants = {"plain products": attend, "fused, rows": attention_as_rows, "fused, grouped": attention_as_fused}
    results = {name: variant(q, keys, values, bias).float() for name, variant in variants.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["plain products"], rtol=0.05, atol=0.05, msg=name)
    return {name: partial(variant, q, keys, values, bias) for name, variant in variants.items()}


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
        f"attention, {batch} rows, {reach} positions": attention(batch, reach) for batch, reach in ((48, 61), (8, 400))
    }
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
