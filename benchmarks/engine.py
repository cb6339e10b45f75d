"""Tokens per second of the local engine beside transformers' batched generate: same model, prompts, threads and dtype.

Both sample at temperature 1 from the whole distribution, both draw the same number of tokens for each prompt (end
tokens end nothing), and each time is that of the whole call: prefill, sampling, detokenising none. The engine reports
log-probabilities as well. Runs alternate, A B A B, so that a busy neighbour slows both; a speed-up is the median over
the rounds of the ratio within a round.

    shoal bench engine
    shoal bench engine -- --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.rollout.host import model_cache

from _common import benchmark, emit

SEQUENCES = 32
GROUPS, GROUP_SIZE = 4, 8
PREFILL_ROWS, PREFILL_TOKENS = 8, 192


@dataclass(frozen=True)
class Load:
    """What both are asked to do."""

    name: str
    prompts: Sequence[Sequence[int]]
    """One for each completion; those of a group follow each other."""
    group_size: int
    new_tokens: int
    budget_s: float
    """No round is begun that would end later than this, so that a slow machine is done within four minutes as well."""

    @property
    def counted_tokens(self) -> int:
        """Drawn tokens; where only one is drawn, prompt tokens."""
        if self.new_tokens == 1:
            return sum(map(len, self.prompts))
        return len(self.prompts) * self.new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    local = resolve(options.model, model_cache(), lambda line: print(line, file=sys.stderr))
    engine = LocalEngine(local, dtype="bf16", device="cpu", threads=options.threads, max_sequences=SEQUENCES)
    logging.disable_progress_bar()
    peer = AutoModelForCausalLM.from_pretrained(str(local.directory), dtype=torch.bfloat16).eval()
    loads = make_loads(engine, options.new_tokens)
    engine.tokenizer.end_ids = frozenset()
    runners: dict[str, Callable[[Load], None]] = {
        "shoal": lambda load: run_engine(engine, load),
        "transformers": lambda load: run_transformers(peer, load),
    }
    seconds: dict[tuple[str, str], list[float]] = {(load.name, who): [] for load in loads for who in runners}
    for load in loads:
        for run in runners.values():  # the first call allocates and packs
            run(replace(load, new_tokens=min(2, load.new_tokens)))
    for load in loads:
        started = began = time.monotonic()
        round_s = 0.0
        for number in range(options.rounds):
            if number and began + 2 * round_s - started > load.budget_s:
                break
            began = time.monotonic()
            for who, run in runners.items():
                at = time.perf_counter()
                run(load)
                seconds[load.name, who].append(time.perf_counter() - at)
            round_s = time.monotonic() - began
            print(f"{load.name}: round {number + 1} took {round_s:.1f} s", file=sys.stderr)
    asyncio.run(engine.close())
    rows = [
        {
            "load": load.name,
            "engine": who,
            "threads": options.threads,
            "sequences": len(load.prompts),
            "tokens_per_s": load.counted_tokens / statistics.median(seconds[load.name, who]),
            "median_s": statistics.median(seconds[load.name, who]),
            "min_s": min(seconds[load.name, who]),
            "max_s": max(seconds[load.name, who]),
            "rounds": len(seconds[load.name, who]),
        }
        for load in loads
        for who in runners
    ]
    speedup = {
        load.name: statistics.median(
            theirs / ours
            for ours, theirs in zip(seconds[load.name, "shoal"], seconds[load.name, "transformers"], strict=True)
        )
        for load in loads
    }
    rates = {row["load"]: row["tokens_per_s"] for row in rows if row["engine"] == "shoal"}
    emit(
        rows,
        {
            "rollout_speedup_vs_transformers": speedup["rollout"],
            "group_speedup_vs_transformers": speedup["group"],
            "single_speedup_vs_transformers": speedup["single"],
            "prefill_speedup_vs_transformers": speedup["prefill"],
            "rollout_tokens_per_s": rates["rollout"],
            "single_tokens_per_s": rates["single"],
            "prefill_tokens_per_s": rates["prefill"],
        },
    )


def make_loads(engine: LocalEngine, new_tokens: int) -> list[Load]:
    def ask(number: int) -> list[int]:
        # Lengths differ by a few tokens, as those of a real batch do.
        return engine.tokenizer.prompt([Message("user", f"What is {number * number} + {(7 * number) % 13}?")])

    questions = [ask(number) for number in range(SEQUENCES)]
    groups = [questions[8 * group] for group in range(GROUPS) for _ in range(GROUP_SIZE)]
    long = [[*question, *range(100, 100 + PREFILL_TOKENS - len(question))] for question in questions[:PREFILL_ROWS]]
    return [
        Load("rollout", questions, 1, new_tokens, budget_s=110.0),
        Load("group", groups, GROUP_SIZE, new_tokens, budget_s=50.0),
        Load("single", questions[:1], 1, new_tokens, budget_s=25.0),
        Load("prefill", long, 1, 1, budget_s=25.0),
    ]


def run_engine(engine: LocalEngine, load: Load) -> None:
    async def everything() -> list[Completion]:
        params = SamplingParams(max_tokens=load.new_tokens)
        return await asyncio.gather(*(engine.sample(SampleRequest(tuple(p), params)) for p in load.prompts))

    completions = asyncio.run(everything())
    assert all(len(c.token_ids) == load.new_tokens for c in completions)


def run_transformers(model: Any, load: Load) -> None:
    distinct = load.prompts[:: load.group_size]
    width = max(map(len, distinct))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=load.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=True,
            top_k=0,
            num_return_sequences=load.group_size,
        )
    assert out.shape == (len(load.prompts), width + load.new_tokens)


if __name__ == "__main__":
    benchmark(main)
