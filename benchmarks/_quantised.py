"""Weights of 8 bits beside bf16: how fast they decode and read, and how far their distributions are from fp32's.

The text is GSM8K's worked answers and HumanEval's solutions where `SHOAL_DATA` has them, otherwise Shoal's own pages.
Error: perplexity of the text, the share of its positions where the likeliest token is fp32's, and the mean divergence
KL(fp32 ‖ ours) in nats.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import make_loads, run_engine
from shoal.engine.cache import KVCache
from shoal.engine.local import LocalEngine
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import TaskError

from _common import need_data

WINDOW = 256
"""Tokens of one piece of text."""

CPU = torch.device("cpu")
KINDS: dict[str, tuple[str, bool]] = {"bf16": ("bf16", False), "int8": ("bf16", True)}


def compare(
    local: LocalModel, *, threads: int, rounds: int, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows, and the numbers that matter."""
    source, windows = text_windows(local, 4 if quick else 24)
    rows, quality = errors(local, source, windows)
    speeds = rates(local, threads, rounds)
    rows += [{"part": "int8", "weights": kind, "load": load, "seconds": s} for (kind, load), s in speeds.items()]
    headline = {
        f"int8_{load}_over_bf16": statistics.median(
            a / b for a, b in zip(speeds["bf16", load], speeds["int8", load], strict=True)
        )
        for load in ("rollout", "single", "prefill")
    }
    return rows, headline | quality


def text_windows(local: LocalModel, count: int) -> tuple[str, list[list[int]]]:
    """Where the text is from, and pieces of it."""
    tokenizer = Tokenizer(local.directory)
    try:
        texts = _fields(need_data("gsm8k_test.jsonl"), ("question", "answer"), 4 * count)
        texts += _fields(need_data("humaneval.jsonl"), ("prompt", "canonical_solution"), 4 * count)
        source = "GSM8K and HumanEval"
    except TaskError:
        texts = [page.read_text() for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))]
        source = "Shoal's pages"
    ids = tokenizer.encode("\n\n".join(texts))
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, WINDOW)]
    return source, windows[:: max(1, len(windows) // count)][:count]


def _fields(path: Path, keys: Sequence[str], count: int) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return ["\n".join(json.loads(line)[key] for key in keys) for line, _ in zip(lines, range(count), strict=False)]


def errors(
    local: LocalModel, source: str, windows: Sequence[Sequence[int]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    exact = _decoder(local, torch.float32, int8=False)
    kinds = {kind: _decoder(local, torch.bfloat16, int8=int8) for kind, (_, int8) in KINDS.items()}
    nll = dict.fromkeys(("fp32", *kinds), 0.0)
    same, divergence = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    count = 0
    for number, window in enumerate(windows):
        target = torch.tensor(window[1:])
        true = logprobs(exact, window)
        nll["fp32"] -= float(true.gather(1, target[:, None]).sum())
        count += len(target)
        for kind, decoder in kinds.items():
            ours = logprobs(decoder, window)
            nll[kind] -= float(ours.gather(1, target[:, None]).sum())
            same[kind] += int((ours.argmax(-1) == true.argmax(-1)).sum())
            divergence[kind] += float((true.exp() * (true - ours)).sum())
        if number % 10 == 0:
            print(f"int8: text {number + 1} of {len(windows)}", file=sys.stderr, flush=True)
    perplexity = {kind: math.exp(total / count) for kind, total in nll.items()}
    rows: list[dict[str, Any]] = [{"part": "int8", "weights": "fp32", "perplexity": perplexity["fp32"]}]
    rows += [
        {
            "part": "int8",
            "weights": kind,
            "source": source,
            "tokens": count,
            "perplexity": perplexity[kind],
            "top1_as_fp32": same[kind] / count,
            "kl_nats": divergence[kind] / count,
        }
        for kind in kinds
    ]
    return rows, {
        "int8_perplexity_over_fp32": perplexity["int8"] / perplexity["fp32"],
        "bf16_perplexity_over_fp32": perplexity["bf16"] / perplexity["fp32"],
        "int8_top1_as_fp32": same["int8"] / count,
        "bf16_top1_as_fp32": same["bf16"] / count,
    }


def _decoder(local: LocalModel, dtype: torch.dtype, *, int8: bool) -> Decoder:
    decoder = Decoder(local.config(), dtype, CPU, int8=int8)
    decoder.load(local.tensors())
    return decoder


@torch.inference_mode()
def logprobs(decoder: Decoder, window: Sequence[int]) -> Tensor:
    """Of what follows each token but the last, [T - 1, V]."""
    arch = decoder.arch
    token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * decoder.dtype.itemsize
    cache = KVCache(arch.num_layers, arch.num_kv_heads, arch.head_dim, 1, 2 * WINDOW * token_bytes, decoder.dtype, CPU)
    cache.reserve(1, len(window), 0)
    hidden = decoder.forward(torch.tensor([list(window)]), torch.zeros(1, dtype=torch.int64), cache)
    return decoder.logits(hidden[0, :-1]).float().log_softmax(-1)


def rates(local: LocalModel, threads: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each load, rounds in turn."""
    engines = {
        kind: LocalEngine(local, dtype=dtype, int8=int8, device="cpu", threads=threads, max_sequences=32)
        for kind, (dtype, int8) in KINDS.items()
    }
    found: dict[tuple[str, str], list[float]] = {}
    loads = [load for load in make_loads(engines["bf16"], 64) if load.name != "group"]
    for engine in engines.values():
        engine.tokenizer.end_ids = frozenset()
        for load in loads:
            run_engine(engine, replace(load, new_tokens=min(2, load.new_tokens)))
    for load in loads:
        for _ in range(rounds):
            for kind, engine in engines.items():
                started = time.perf_counter()
                run_engine(engine, load)
                found.setdefault((kind, load.name), []).append(time.perf_counter() - started)
    for engine in engines.values():
        asyncio.run(engine.close())
    return found
