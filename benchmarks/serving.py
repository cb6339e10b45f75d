"""Serving: exactness against transformers, speed beside it and vLLM, many streams, int8 weights; over stages as well.

parity    greedy fp32 completions of many prompts (`_asked`), drawn together, in one process and over stages, are
          teacher-forced through transformers; a token that is not its likeliest is a divergence, whose margin is how
          much likelier, in logits, the likeliest was (`_forced`). The model itself, and tiny random ones.
speed     32 sequences and one, bf16, beside transformers' `generate`; rounds alternate.
vllm      the same 32 beside vLLM's CPU build (`_vllm`), eager and compiled, both on the same core and on two.
soak      a real server, many clients, half of them leave; every answer is teacher-forced (`_soak`).
int8      weights of 8 bits: speed beside bf16, and how far fp32's distributions are (`_quantised`).
pipeline  three stages that take turns, beside one process, by the time between tokens (`_stages`).
delays    30 ms on every link between machines (needs root): a token's time beside the model t0 + N t1; 16 beside one.
failover  a stage is killed (-9) in the middle of each of 20 requests.

Each part can be chosen; what was not run is not in the headline. A part that cannot run (no root, no peer) says so in
a row, and the others go on. What was served, by which weights on which nodes, is written as a receipt signed by this
node's key (`shoal serve --verify-receipt FILE` checks it). All parts together take about 40 minutes on two cores.

    shoal bench serving
    shoal bench serving -- --prepare                       # builds the peer's environment, once
    shoal bench serving -- --only parity failover
    shoal bench serving -- --quick                         # a few minutes: does everything run?
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import _quantised
import _soak
import _stages
import _vllm
from _asked import prompts, questions
from _forced import NEAR_TIE, Reference
from engine import Load, make_loads, run_engine, run_transformers
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel, resolve, weight_files
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ShoalError
from shoal.fabric.identity import Identity, data_dir
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion
from shoal.rollout.host import model_cache
from shoal.serving import receipt

from _common import benchmark, emit

SEQUENCES = 32
FEW_PROMPTS = 20
"""For the tiny models."""

QUICK = {"prompts": 8, "tokens": 16, "rounds": 1, "streams": 16, "streams_s": 15.0, "stages": [0, 2], "trials": 2}
TINY = ("llama", "qwen3")
FAILOVER_BUDGET_S = 900.0
"""No further stage is killed after this long."""

Rows = list[dict[str, Any]]
Found = tuple[Rows, dict[str, float]]
Part = Callable[[LocalModel, argparse.Namespace], Found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--quick", action="store_true", help="a few prompts, rounds, streams and seconds of each")
    parser.add_argument("--prepare", action="store_true", help="build the environment of the peer, and nothing else")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--streams-s", type=float, default=600.0)
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 2, 3, 5], help="of the parity; 0: one process")
    parser.add_argument("--trials", type=int, default=20, help="stages killed in the part failover")
    parser.add_argument("--receipt", type=Path, help="where the signed receipt goes")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if options.prepare:
        where = _vllm.python()
        emit([{"part": "prepare", "python": str(where), "tcmalloc": _vllm.tcmalloc()}], {})
        return
    local = resolve(options.model, model_cache(), lambda line: print(line, file=sys.stderr))
    rows: Rows = []
    headline: dict[str, float] = {}
    for name in PARTS:
        if name in options.only:
            found, numbers = timed(name, local, options)
            rows += found
            headline |= numbers
    rows.append(signed(local, options, rows))
    emit(rows, headline)


def timed(name: str, local: LocalModel, options: argparse.Namespace) -> Found:
    """Run a part; one that this machine cannot run says why, and costs the others nothing."""
    print(f"{name} …", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        rows, numbers = PARTS[name](local, options)
    except ShoalError as error:
        rows, numbers = [{"part": name, "not_run": str(error)}], {}
        print(f"{name} did not run: {error}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.0f} s; {numbers}", file=sys.stderr, flush=True)
    return [*rows, {"part": name, "part_s": seconds}], numbers


def signed(local: LocalModel, options: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Write the receipt; gives the row that says where it is."""
    when = int(time.time())
    facts = {
        "model": options.model,
        "weights": receipt.weights_hash(weight_files(local.directory)),
        "threads": options.threads,
        "when": when,
        "rows": rows,
    }
    made = receipt.sign(Identity.load_or_create(data_dir()), facts)
    receipt.verified(json.dumps(made))
    path: Path = options.receipt or data_dir() / "receipts" / f"serving-{when}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1))
    return {"part": "receipt", "file": str(path), "node": made["node"], "signature": made["signature"]}


def parity(local: LocalModel, options: argparse.Namespace) -> Found:
    """The model itself, and tiny random ones of other families."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = [
            (local.name, local, options.prompts),
            *((kind, tiny(Path(folder) / kind, kind, local), min(FEW_PROMPTS, options.prompts)) for kind in TINY),
        ]
        for name, model, count in models:
            reference = Reference(model.directory)
            for stages in options.stages:
                rows.append(parity_of(name, model, reference, count, stages, options))
                print(f"parity: {rows[-1]}", file=sys.stderr, flush=True)
    return rows, {
        "worst_divergence_margin": max(row["worst_margin"] for row in rows),
        "parity_tokens": float(sum(row["tokens"] for row in rows)),
    }


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


def parity_of(
    name: str, model: LocalModel, reference: Reference, count: int, stages: int, options: argparse.Namespace
) -> dict[str, Any]:
    tokenizer = Tokenizer(model.directory)
    source, texts = prompts(count)
    asked = [tuple(tokenizer.prompt([Message("user", text)])) for text in texts]

    async def draw() -> tuple[list[Completion], Rows]:
        if stages:
            async with _stages.over(model, stages, options.threads, "fp32") as served:
                return await _stages.draw(served.engine, asked, options.tokens), _stages.nodes(served)
        async with _stages.local_engine(model, options.threads, "fp32") as engine:
            return await _stages.draw(engine, asked, options.tokens), []

    started = time.monotonic()
    done, nodes = asyncio.run(draw())
    seconds = time.monotonic() - started
    judged = reference.judge([(p, c.token_ids) for p, c in zip(asked, done, strict=True)])
    margins = [margin for one in judged for margin in one.margins]
    return {
        "part": "parity",
        "model": name,
        "stages": stages,
        "source": source,
        "prompts": count,
        "tokens": len(margins),
        "divergences": sum(margin > 0 for margin in margins),
        "worst_margin": max(margins),
        "draw_s": seconds,
        "nodes": nodes,
    }


def speed(local: LocalModel, options: argparse.Namespace) -> Found:
    """32 sequences and one, beside transformers' `generate`, rounds in turn."""
    engine = LocalEngine(local, dtype="bf16", device="cpu", threads=options.threads, max_sequences=SEQUENCES)
    peer = AutoModelForCausalLM.from_pretrained(str(local.directory), dtype=torch.bfloat16).eval()
    loads = [load for load in make_loads(engine, 64) if load.name in ("rollout", "single")]
    engine.tokenizer.end_ids = frozenset()
    rows: Rows = []
    headline = {}
    for load in loads:  # the first call allocates and packs
        run_engine(engine, replace(load, new_tokens=2))
        run_transformers(peer, replace(load, new_tokens=2))
    for load in loads:
        key = {"rollout": "decode32_over_transformers", "single": "single_over_transformers_generate"}[load.name]
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(seconds_of(run_engine, engine, load))
            theirs.append(seconds_of(run_transformers, peer, load))
        for who, seconds in (("shoal", ours), ("transformers", theirs)):
            rows.append(speed_row("speed", who, load, options.threads, seconds))
        headline[key] = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    asyncio.run(engine.close())
    return rows, headline


def seconds_of(run: Callable[[Any, Load], None], who: Any, load: Load) -> float:
    started = time.perf_counter()
    run(who, load)
    return time.perf_counter() - started


def speed_row(part: str, who: str, load: Load, threads: int, seconds: list[float]) -> dict[str, Any]:
    rate = load.counted_tokens / statistics.median(seconds)
    return {
        "part": part,
        "load": load.name,
        "engine": who,
        "threads": threads,
        "tokens_per_s": rate,
        "seconds": seconds,
    }


def vllm(local: LocalModel, options: argparse.Namespace) -> Found:
    """32 sequences beside vLLM, rounds in turn, on the same cores; each of its modes on one core and on two.

    Decoding is what a call of 64 tokens takes beyond one of a single token, which is the prompts and their first.
    """
    rows: Rows = []
    headline: dict[str, float] = {}
    for threads in range(1, min(2, os.cpu_count() or 1) + 1):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        whole, decoding = [], []
        for mode in _vllm.MODES:
            with pinned(cores), _vllm.running(local.directory, mode, cores=cores, sequences=SEQUENCES) as peer:
                engine = LocalEngine(local, dtype="bf16", device="cpu", threads=threads, max_sequences=SEQUENCES)
                load = next(load for load in make_loads(engine, 64) if load.name == "rollout")
                engine.tokenizer.end_ids = frozenset()
                first = replace(load, new_tokens=1)
                run_engine(engine, replace(load, new_tokens=2))
                peer.run(load.prompts, 2)
                ours: dict[int, list[tuple[float, float]]] = {1: [], load.new_tokens: []}
                theirs: dict[int, list[tuple[float, float]]] = {1: [], load.new_tokens: []}
                for _ in range(options.rounds):
                    for part in (first, load):
                        processor = time.process_time()
                        seconds = seconds_of(run_engine, engine, part)
                        ours[part.new_tokens].append((seconds, time.process_time() - processor))
                        theirs[part.new_tokens].append(peer.run(load.prompts, part.new_tokens))
                asyncio.run(engine.close())
            for who, took in (("shoal", ours), (f"vllm {mode}", theirs)):
                row = speed_row("vllm", who, load, threads, [seconds for seconds, _ in took[load.new_tokens]])
                row["prompt_seconds"] = [seconds for seconds, _ in took[1]]
                row["processor_s"] = [seconds for _, seconds in took[load.new_tokens]]
                row["prompt_processor_s"] = [seconds for _, seconds in took[1]]
                rows.append(row)
            rows[-1]["tcmalloc"] = _vllm.tcmalloc()
            pairs = list(zip(ours[load.new_tokens], theirs[load.new_tokens], strict=True))
            our_prompts, their_prompts = (
                statistics.median(seconds for seconds, _ in took[1]) for took in (ours, theirs)
            )
            whole.append(statistics.median(t[0] / o[0] for o, t in pairs))
            decoding.append(statistics.median((t[0] - their_prompts) / (o[0] - our_prompts) for o, t in pairs))
            said = f"vllm: {mode}, {threads} threads: {decoding[-1]:.2f}, with prompts {whole[-1]:.2f}"
            print(said, file=sys.stderr, flush=True)
        # Its best mode is the one that we are least ahead of.
        suffix = "" if threads == 1 else "_2_threads"
        headline[f"decode32_over_vllm_cpu{suffix}"] = min(decoding)
        headline[f"rollout32_over_vllm_cpu{suffix}"] = min(whole)
    return rows, headline


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Threads that begin inside stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def soak(local: LocalModel, options: argparse.Namespace) -> Found:
    """Many clients of a server in its own process; half of them leave in the middle of their streams."""
    texts = questions(min(60, options.prompts))
    result = _soak.soak(local, texts, streams=options.streams, seconds=options.streams_s, threads=options.threads)
    names = ("wrong_answers", "streams_finished", "streams_left", "memory_growth_mb", "left_inside")
    return [{"part": "soak", "streams": options.streams, **result}], {name: result[name] for name in names}


def int8(local: LocalModel, options: argparse.Namespace) -> Found:
    """Weights of 8 bits beside bf16, and both beside fp32."""
    return _quantised.compare(local, threads=options.threads, rounds=options.rounds, quick=options.quick)


def pipeline(local: LocalModel, options: argparse.Namespace) -> Found:
    """Three stages beside one process."""
    asked = questions(SEQUENCES)
    return asyncio.run(
        _stages.beside_local(local, asked, threads=options.threads, rounds=options.rounds, tokens=options.tokens // 2)
    )


def delays(local: LocalModel, options: argparse.Namespace) -> Found:
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
    return [{"part": "delays", "link_s": _stages.LINK_S, "model_s": model_s, **found}], headline


def failover(local: LocalModel, options: argparse.Namespace) -> Found:
    """Stages killed in the middle; the tokens are teacher-forced through transformers."""
    rows, pairs = asyncio.run(
        _stages.failing(
            local,
            questions(10),
            threads=options.threads,
            trials=options.trials,
            tokens=options.tokens // 2,
            budget_s=FAILOVER_BUDGET_S,
        )
    )
    judged = Reference(local.directory).judge([(prompt, found.token_ids) for prompt, _, found in pairs])
    right = 0
    for row, one, (_, calm, found) in zip(rows, judged, pairs, strict=True):
        row["worst_margin"] = one.worst
        same_length = len(found.token_ids) == len(calm.token_ids) or one.worst > 0
        right += found.finish in ("stop", "length") and same_length and one.worst < NEAR_TIE
    pauses = [row["pause_s"] for row in rows]
    return rows, {
        "failover_right": float(right),
        "failover_trials": float(len(rows)),
        "failover_p50_s": statistics.median(pauses),
        "failover_worst_s": max(pauses),
    }


PARTS: dict[str, Part] = {
    "parity": parity,
    "speed": speed,
    "vllm": vllm,
    "soak": soak,
    "int8": int8,
    "pipeline": pipeline,
    "delays": delays,
    "failover": failover,
}


if __name__ == "__main__":
    benchmark(main)
