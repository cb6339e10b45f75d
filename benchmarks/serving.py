"""Serving: exactness against transformers, speed beside it, many streams whose clients leave; over stages as well.

Parity: greedy fp32 completions of many prompts, drawn together, are teacher-forced through transformers; a token that
is not its likeliest is a divergence, whose margin is how much likelier (in logits) the likeliest was. Near-ties below
1e-3 are what the order of sums may flip. Speed: as in `shoal bench engine`, bf16, rounds alternate. Streams: a real
server process; clients ask greedily, half of them leave early; every text must be the beginning of what transformers
generates, up to a near-tie.

Over stages (`_stages`): parity again with 2, 3 and 5; pipeline: three stages that take turns, beside one process, by
the time between tokens; delays: 30 ms on every link between machines (needs root), the time of a token beside the
model t0 + N t1, and 16 streams beside one; failover: a stage is killed (-9) in the middle of each of 20 requests.

Each part can be chosen; what was not run is not in the headline. A signed receipt of what was served is written beside
the rows.

    shoal bench serving
    shoal bench serving -- --parts parity streams --streams-s 600
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import _stages
from engine import make_loads, run_engine, run_transformers
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel, resolve, weight_files
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import RunError
from shoal.fabric.identity import Identity
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion
from shoal.rollout.host import model_cache
from shoal.serving import receipt

from _common import benchmark, emit

PARTS = ("parity", "speed", "streams", "pipeline", "delays", "failover")
NEAR_TIE = 1e-3
SEQUENCES = 32
START_S = 120.0
QUESTIONS = (
    "How many apples are left if Tom has {a} and gives {b} to each of his {c} friends?",
    "A train travels {a} km in {b} hours. How far does it travel in {c} hours?",
    "Write a Python function that returns the sum of {a}, {b} and {c}.",
    "Write a Python function that removes every {c}th item of a list of {a} items.",
    "Explain to a child of {b} why {a} is not a prime number.",
)


@dataclass(frozen=True)
class Reference:
    """What transformers generates for a prompt, and by how much each token led."""

    prompt: str
    ids: tuple[int, ...]
    margins: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--streams-s", type=float, default=60.0)
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 2, 3, 5], help="of the parity; 0: one process")
    parser.add_argument("--trials", type=int, default=20, help="stages killed in the part failover")
    parser.add_argument("--receipt", type=Path, help="where the signed receipt goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    local = resolve(options.model, model_cache(), lambda line: print(line, file=sys.stderr))
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    every = {"parity": parity, "speed": speed, "streams": streams}
    every |= {"pipeline": pipeline, "delays": delays, "failover": failover}
    for part, run in every.items():
        if part in options.parts:
            print(f"{part} …", file=sys.stderr)
            found, numbers = run(local, options)
            rows += found
            headline |= numbers
    facts = {
        "model": options.model,
        "weights": receipt.weights_hash(weight_files(local.directory)),
        "threads": options.threads,
        "when": int(time.time()),
        "rows": rows,
    }
    signed = receipt.sign(Identity.generate(), facts)
    receipt.verified(json.dumps(signed))
    if options.receipt is not None:
        options.receipt.write_text(json.dumps(signed, indent=1))
    emit(rows, headline)


def questions(count: int) -> list[str]:
    stream = random.Random(0)
    return [
        QUESTIONS[n % len(QUESTIONS)].format(
            a=stream.randrange(20, 99), b=stream.randrange(3, 12), c=stream.randrange(2, 9)
        )
        for n in range(count)
    ]


def parity(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The model itself, and tiny random ones of other families."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = [
            (local.name, local, options.prompts),
            *((k, tiny(Path(folder) / k, k, local), 20) for k in ("llama", "qwen3")),
        ]
        for name, model, count in models:
            rows += [parity_of(name, model, count, stages, options) for stages in options.stages]
    return rows, {"worst_divergence_margin": max(row["worst_margin"] for row in rows)}


def tiny(folder: Path, kind: str, local: LocalModel) -> LocalModel:
    """A random model of a family over the same tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=local.config().vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    Tokenizer(local.directory).hf.save_pretrained(folder)
    return LocalModel(kind, folder)


def parity_of(name: str, model: LocalModel, count: int, stages: int, options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = Tokenizer(model.directory)
    prompts = [tuple(tokenizer.prompt([Message("user", q)])) for q in questions(count)]

    async def draw() -> list[Completion]:
        if stages:
            async with _stages.over(model, stages, options.threads, "fp32") as served:
                return await _stages.draw(served.engine, prompts, options.tokens)
        async with LocalEngine(
            model, dtype="fp32", device="cpu", threads=options.threads, max_sequences=SEQUENCES, prefix_tokens=4096,
            prefill_tokens=512,
        ) as engine:  # fmt: skip
            return await _stages.draw(engine, prompts, options.tokens)

    done = asyncio.run(draw())
    peer = AutoModelForCausalLM.from_pretrained(str(model.directory), dtype=torch.float32).eval()
    margins = [margin for p, c in zip(prompts, done, strict=True) for margin in divergences(peer, p, c.token_ids)]
    return {
        "part": "parity",
        "model": name,
        "stages": stages,
        "prompts": count,
        "tokens": sum(len(c.token_ids) for c in done),
        "divergences": sum(margin > 0 for margin in margins),
        "worst_margin": max(margins),
    }


@torch.inference_mode()
def divergences(peer: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """For each token, how much likelier the likeliest was, in logits: 0 where it is the one."""
    logits = peer(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return [float(m) for m in logits.amax(-1) - logits[torch.arange(len(ids)), list(ids)]]


def speed(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """32 sequences and one, beside transformers' `generate`, rounds in turn."""
    engine = LocalEngine(local, dtype="bf16", device="cpu", threads=options.threads, max_sequences=SEQUENCES)
    peer = AutoModelForCausalLM.from_pretrained(str(local.directory), dtype=torch.bfloat16).eval()
    loads = [load for load in make_loads(engine, 64) if load.name in ("rollout", "single")]
    engine.tokenizer.end_ids = frozenset()
    rows, headline = [], {}
    for load in loads:  # the first call allocates and packs
        run_engine(engine, replace(load, new_tokens=2))
        run_transformers(peer, replace(load, new_tokens=2))
    for load in loads:
        key = {"rollout": "decode32_over_transformers", "single": "single_over_transformers_generate"}[load.name]
        ours, theirs = [], []
        for _ in range(options.rounds):
            started = time.perf_counter()
            run_engine(engine, load)
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            run_transformers(peer, load)
            theirs.append(time.perf_counter() - started)
        for who, seconds in (("shoal", ours), ("transformers", theirs)):
            rate = load.counted_tokens / statistics.median(seconds)
            rows.append({"part": "speed", "load": load.name, "engine": who, "tokens_per_s": rate, "seconds": seconds})
        headline[key] = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    asyncio.run(engine.close())
    return rows, headline


def pipeline(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Three stages beside one process."""
    asked = questions(SEQUENCES)
    return asyncio.run(
        _stages.beside_local(local, asked, threads=options.threads, rounds=options.rounds, tokens=options.tokens // 2)
    )


def delays(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Three stages, three links of 30 ms."""
    asked = questions(16)
    found = asyncio.run(
        _stages.delayed(local, asked, threads=options.threads, rounds=options.rounds, tokens=options.tokens // 2)
    )
    model_s = [alone_s + _stages.HOPS * _stages.LINK_S for alone_s in found["alone_s"]]
    headline = {
        "token_time_over_model": statistics.median(a / b for a, b in zip(found["one_s"], model_s, strict=True)),
        "inflight16_over_one": statistics.median(
            16 * a / b for a, b in zip(found["one_s"], found["sixteen_s"], strict=True)
        ),
    }
    return [{"part": "delays", "model_s": model_s, **found}], headline


def failover(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Stages killed in the middle; the tokens are teacher-forced through transformers."""
    rows, pairs = asyncio.run(
        _stages.failing(
            local, questions(10), threads=options.threads, trials=options.trials, tokens=options.tokens // 2
        )
    )
    peer = AutoModelForCausalLM.from_pretrained(str(local.directory), dtype=torch.float32).eval()
    right = 0
    for row, (prompt, calm, found) in zip(rows, pairs, strict=True):
        row["worst_margin"] = max(divergences(peer, prompt, found.token_ids))
        same_length = len(found.token_ids) == len(calm.token_ids) or row["worst_margin"] > 0
        right += found.finish in ("stop", "length") and same_length and row["worst_margin"] < NEAR_TIE
    pauses = [row["pause_s"] for row in rows]
    return rows, {
        "failover_right": float(right),
        "failover_trials": float(len(rows)),
        "failover_p50_s": statistics.median(pauses),
        "failover_worst_s": max(pauses),
    }


def streams(local: LocalModel, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Many clients of a server in its own process; half of them leave in the middle of their streams."""
    tokenizer = Tokenizer(local.directory)
    known = references(local, tokenizer, questions(12), 48)
    with server(local, options) as (url, process):
        result = asyncio.run(ask_many(url, process, tokenizer, known, options))
    names = ("wrong_answers", "streams_finished", "streams_left", "memory_growth_mb", "left_inside")
    return [{"part": "streams", "streams": options.streams, **result}], {name: result[name] for name in names}


@torch.inference_mode()
def references(local: LocalModel, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int) -> list[Reference]:
    peer = AutoModelForCausalLM.from_pretrained(str(local.directory), dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.prompt([Message("user", prompt)])])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        top = [score[0].topk(2).values for score in out.scores]
        drawn = tuple(out.sequences[0, ids.shape[1] :].tolist())
        found.append(Reference(prompt, drawn, tuple(float(t[0] - t[1]) for t in top)))
    return found


@contextlib.contextmanager
def server(local: LocalModel, options: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shoal.cli", "serve", str(local.directory), "--name", "served", "--dtype", "fp32"]
    command += ["--port", str(port), "--threads", str(options.threads), "--context-tokens", "512"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError("the server did not start.", "Try shoal serve by hand.")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def ask_many(
    url: str,
    process: subprocess.Popen[bytes],
    tokenizer: Tokenizer,
    known: Sequence[Reference],
    options: argparse.Namespace,
) -> dict[str, Any]:
    counts = {"finished": 0, "left": 0, "wrong": 0}
    started = time.monotonic()
    memory: list[float] = []

    async def client(number: int) -> None:
        stream = random.Random(number)
        while time.monotonic() - started < options.streams_s:
            reference = stream.choice(known)
            leave_after = stream.randrange(1, 40) if stream.random() < 0.5 else 10**9
            text, ended = await one(reference, leave_after)
            counts["finished" if ended else "left"] += 1
            counts["wrong"] += not right(tokenizer, reference, text, ended)

    async def one(reference: Reference, leave_after: int) -> tuple[str, bool]:
        body = {
            "model": "served",
            "messages": [{"role": "user", "content": reference.prompt}],
            "temperature": 0,
            "max_tokens": len(reference.ids),
            "stream": True,
        }
        text = ""
        async with asked.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            pieces = 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text, True
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
                    pieces += 1
                    if pieces > leave_after:
                        break
        return text, False

    async def watch() -> None:
        while True:
            memory.append(resident_mb(process.pid))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=options.streams)
    async with httpx.AsyncClient(timeout=httpx.Timeout(300), limits=limits) as asked:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client(number) for number in range(options.streams)))
        watcher.cancel()
        inside = await until_empty(asked, url)
    third = max(1, len(memory) // 3)
    return {
        "seconds": time.monotonic() - started,
        "streams_finished": counts["finished"],
        "streams_left": counts["left"],
        "wrong_answers": counts["wrong"],
        "memory_mb": max(memory),
        "memory_growth_mb": max(memory[-third:]) - max(memory[third : 2 * third] or memory),
        "left_inside": inside,
    }


def right(tokenizer: Tokenizer, reference: Reference, text: str, ended: bool) -> bool:
    """Whether a text is what transformers says, up to a near-tie."""
    whole = tokenizer.decode(reference.ids)
    if text == whole or (not ended and whole.startswith(text)):
        return True
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False)))
    at = next((n for n in range(len(reference.ids)) if len(tokenizer.decode(reference.ids[: n + 1])) > same), None)
    # One that differs only after the first near-tie was drawn as rightly as the reference.
    return at is not None and min(reference.margins[: at + 1]) < NEAR_TIE


async def until_empty(client: httpx.AsyncClient, url: str) -> float:
    """Completions that are still inside a while after everybody has gone."""
    inside = 1.0
    for _ in range(100):
        page = (await client.get(f"{url}/metrics")).text
        inside = next(float(x.split()[1]) for x in page.splitlines() if x.startswith("shoal_completions_inside "))
        if not inside:
            break
        await asyncio.sleep(0.1)
    return inside


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    benchmark(main)
