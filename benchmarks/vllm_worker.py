"""vLLM as a worker's engine beside our own: tokens a second, seconds to change weights, and whether both say the same.

    shoal bench vllm_worker --json          # SHOAL_VLLM_PYTHON, or the peer environment that `serving --prepare` builds

The embedded model in bf16 by default, on one core each in turn. Both draw the same number of tokens after the same
prompts; weights are changed `--changes` times, to scaled ones and back. `logprob_difference` is the mean difference of
both engines' log-probabilities for the tokens that vLLM drew, computed by ours in one pass; `changed_back` is 1 where
greedy answers after the changes are those before them. Three to five minutes, most of them vLLM's start.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

import torch

from _vllm import python
from shoal.broadcast.tensors import TensorView
from shoal.engine.cache import KVCache
from shoal.engine.local import LocalEngine
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel, resolve
from shoal.engine.weights import to_views
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.protocol.work import WorkSpec
from shoal.rollout.host import model_cache
from shoal.rollout.vllm_engine import VllmEngine, vllm_engine
from shoal.rollout.vllm_server import VllmOptions

from _common import benchmark, emit

CONTEXT_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--changes", type=int, default=4, help="of weights; an even number ends where it began")
    options = parser.parse_args()
    asyncio.run(compare(options))


async def compare(options: argparse.Namespace) -> None:
    local = resolve(options.model, model_cache())
    rng = random.Random(4)
    prompts = [tuple(rng.randrange(100, 5000) for _ in range(24)) for _ in range(options.sequences)]
    spec = WorkSpec(model=options.model, dtype="bf16", envs={}, context_tokens=CONTEXT_TOKENS, heartbeat_s=1.0)
    versions = [views_of(local, factor) for factor in (1.0, 1.02)]
    started = time.perf_counter()
    print("vLLM starts …", file=sys.stderr, flush=True)
    made = vllm_engine(
        local,
        spec,
        VllmOptions(str(python())),
        device="cpu",
        threads=1,
        max_sequences=options.sequences,
        cache_tokens=options.sequences * CONTEXT_TOKENS,
    )
    async with made as engine:
        start_s = time.perf_counter() - started
        theirs, completions = await measure("vllm", engine, prompts, versions, options)
    ours_engine = LocalEngine(
        local,
        dtype="bf16",
        device="cpu",
        max_sequences=options.sequences,
        cache_tokens=options.sequences * CONTEXT_TOKENS,
        context_tokens=CONTEXT_TOKENS,
    )
    try:
        ours, _ = await measure("shoal", ours_engine, prompts, versions, options)
    finally:
        await ours_engine.close()
    difference = await asyncio.to_thread(disagreement, local, prompts, completions)
    emit(
        [{**theirs, "start_s": start_s}, ours],
        {
            "vllm_tokens_per_s": theirs["tokens_per_s"],
            "shoal_tokens_per_s": ours["tokens_per_s"],
            "vllm_change_s": theirs["change_s"],
            "shoal_change_s": ours["change_s"],
            "logprob_difference": difference,
            "changed_back": theirs["changed_back"],
        },
    )


def views_of(local: LocalModel, factor: float) -> dict[str, TensorView]:
    return dict(to_views({name: (t.float() * factor).to(torch.bfloat16) for name, t in local.tensors().items()}))


async def measure(
    name: str,
    engine: VllmEngine | LocalEngine,
    prompts: list[tuple[int, ...]],
    versions: list[dict[str, TensorView]],
    options: argparse.Namespace,
) -> tuple[dict[str, Any], list[Completion]]:
    """One engine, warmed up; and what it drew under the first weights."""
    print(f"{name} …", file=sys.stderr, flush=True)

    async def draw(temperature: float, tokens: int) -> list[Completion]:
        return await asyncio.gather(
            *(
                engine.sample(
                    SampleRequest(
                        prompt_ids=prompt, params=SamplingParams(max_tokens=tokens, temperature=temperature, seed=at)
                    )
                )
                for at, prompt in enumerate(prompts)
            )
        )

    await engine.load_weights(0, versions[0])
    await draw(1.0, 4)
    began = time.perf_counter()
    drawn = await draw(1.0, options.tokens)
    took = time.perf_counter() - began
    before = await draw(0.0, 8)
    changes = []
    for number in range(1, options.changes + 1):
        began = time.perf_counter()
        await engine.load_weights(number, versions[number % 2])
        changes.append(time.perf_counter() - began)
    after = await draw(0.0, 8)
    tokens = sum(len(one.token_ids) for one in drawn)
    return {
        "engine": name,
        "sequences": len(prompts),
        "tokens": tokens,
        "tokens_per_s": tokens / took,
        "change_s": statistics.median(changes),
        "changed_back": int([one.token_ids for one in before] == [one.token_ids for one in after]),
    }, drawn


@torch.inference_mode()
def disagreement(local: LocalModel, prompts: list[tuple[int, ...]], drawn: list[Completion]) -> float:
    """Mean |log μ − log π| of drawn tokens, π by our own forward pass."""
    model = Decoder(local.config(), torch.bfloat16, torch.device("cpu"))
    model.load(local.tensors())
    arch, differences = model.arch, []
    for prompt, one in zip(prompts, drawn, strict=True):
        ids = [*prompt, *one.token_ids[:-1]]
        cache = KVCache(arch.num_layers, arch.num_kv_heads, arch.head_dim, 1, 1 << 62, model.dtype, model.device)
        cache.reserve(1, len(ids), 0)
        hidden = model.forward(torch.tensor([ids]), torch.tensor([0]), cache)[0]
        logs = torch.log_softmax(model.logits(hidden[len(prompt) - 1 :]).float(), dim=-1)
        expected = logs.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        differences += (expected - torch.tensor(one.logprobs)).abs().tolist()
    return statistics.fmean(differences)


if __name__ == "__main__":
    benchmark(main)
