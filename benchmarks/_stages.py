"""The pipeline's parts of the serving benchmark: the same model over stages, beside itself in one process.

Run as a script, it is the requester of the part with delays, inside a namespace of the lab.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from shoal.config import Serving
from shoal.engine.local import LocalEngine
from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.engine.sequence import Drawn
from shoal.engine.source import LocalModel
from shoal.errors import RunError
from shoal.lab.network import Network, Node
from shoal.lab.packet import packet_lab
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.serving.pipeline import Served, serving_over

START_S = 300.0
CONTEXT_TOKENS = 1024
CACHE_TOKENS = 32 * 1024
LINK_S = 0.030
"""One way, on each link of the part with delays."""

HOPS = 3
"""Links of that part's ring: its first stage is on the requester's machine, the other two are not."""

Engine: TypeAlias = LocalEngine | PipelineEngine


def settings(stages: int, threads: int, dtype: str, **more: Any) -> Serving:
    return Serving(
        stages=stages,
        threads=threads,
        dtype=dtype,  # type: ignore[arg-type]
        device="cpu",
        max_sequences=32,
        cache_tokens=CACHE_TOKENS,
        context_tokens=CONTEXT_TOKENS,
        stage_patience_s=START_S,
        **more,
    )


def local_engine(model: LocalModel, threads: int, dtype: str) -> LocalEngine:
    return LocalEngine(
        model, dtype=dtype, device="cpu", threads=threads, max_sequences=32, cache_tokens=CACHE_TOKENS,
        context_tokens=CONTEXT_TOKENS, prefill_tokens=512,
    )  # fmt: skip


@asynccontextmanager
async def over(model: LocalModel, stages: int, threads: int, dtype: str, **more: Any) -> AsyncIterator[Served]:
    """The model over stages, ready."""
    async with serving_over(model, model.name, settings(stages, threads, dtype, **more)) as served:
        await ready(served, stages)
        yield served


async def ready(served: Served, stages: int) -> None:
    deadline = time.monotonic() + START_S
    while len(served.stages.placements) < stages:
        if time.monotonic() > deadline:
            raise RunError("the stages did not come.", f"See the logs in {served.folder}.")
        await asyncio.sleep(0.05)


def nodes(served: Served) -> list[dict[str, Any]]:
    """Who computes which layers, and how far from the requester."""
    return [
        {
            "node": peer.node_id,
            "name": peer.name,
            "device": peer.device,
            "layers": [first, last],
            "delay_s": peer.offer.delay_s if peer.offer else None,
        }
        for peer, first, last in served.stages.placements
    ]


async def draw(engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Completion]:
    """All together, greedily."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    return list(await asyncio.gather(*(engine.sample(SampleRequest(prompt, params)) for prompt in prompts)))


async def token_s(engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int) -> float:
    """Seconds between a stream's tokens, all streams together, from when the first token of each is there.

    Decoding alone: the median over the streams of the time between their first and last token, by token.
    """

    async def one(prompt: tuple[int, ...]) -> float:
        times = []
        params = SamplingParams(max_tokens=tokens, temperature=0.0)
        async with aclosing(engine.draws(SampleRequest(prompt, params))) as draws:
            async for drawn in draws:
                if isinstance(drawn, Drawn):
                    times.append(time.perf_counter())
        return (times[-1] - times[0]) / (len(times) - 1)

    return statistics.median(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def prompts_of(engine: Engine, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [tuple(engine.tokenizer.prompt([Message("user", text)])) for text in texts]


async def beside_local(
    model: LocalModel, texts: Sequence[str], *, threads: int, rounds: int, tokens: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Three stages that take turns, one batch under way, beside the same model in one process; rounds alternate."""
    rows: list[dict[str, Any]] = []
    headline = {}
    async with local_engine(model, threads, "bf16") as local, over(model, 3, threads, "bf16", in_flight=1) as served:
        local.tokenizer.end_ids = served.engine.tokenizer.end_ids = frozenset()
        every = prompts_of(local, texts)
        for name, prompts in (("pipeline_over_local", every[:32]), ("pipeline_single_over_local", every[:1])):
            taken: dict[str, list[float]] = {"local": [], "stages": []}
            processor = {"local": 0.0, "stages": 0.0}
            hops = []
            for engine in (local, served.engine):
                await draw(engine, prompts, 4)
            for _ in range(rounds):
                for who, engine in (("local", local), ("stages", served.engine)):
                    before = processor_s()
                    taken[who].append(await token_s(engine, prompts, tokens))
                    processor[who] += processor_s() - before
                round_s, busy_s = served.engine.last_round
                hops.append((round_s - sum(busy_s)) / (len(busy_s) + 1))
            for who, seconds in taken.items():
                row = {"part": "pipeline", "engine": who, "streams": len(prompts), "token_s": seconds}
                rows.append({**row, "processor_s": processor[who]})
            rows[-1] |= {"hop_s": statistics.median(hops), "last_busy_s": busy_s, "nodes": nodes(served)}
            ratios = [a / b for a, b in zip(taken["local"], taken["stages"], strict=True)]
            headline[name] = statistics.median(ratios)
            headline[f"{name}_processor"] = processor["local"] / processor["stages"]
            if len(prompts) == 1:
                headline["hop_ms"] = 1000 * statistics.median(hops)
    return rows, headline


async def failing(
    model: LocalModel, texts: Sequence[str], *, threads: int, trials: int, tokens: int, budget_s: float
) -> tuple[list[dict[str, Any]], list[tuple[tuple[int, ...], Completion, Completion]]]:
    """Requests in whose middle a stage is killed (-9), and what an undisturbed run gave.

    No further one is begun after `budget_s`.
    """
    stream = random.Random(0)
    rows: list[dict[str, Any]] = []
    pairs = []
    began = time.monotonic()
    async with over(model, 3, threads, "fp32", in_flight=1) as served:
        engine = served.engine
        prompts = prompts_of(engine, texts)
        for trial in range(trials):
            if time.monotonic() > began + budget_s:
                break
            prompt = prompts[trial % len(prompts)]
            params = SamplingParams(max_tokens=tokens, temperature=0.0)
            started = time.perf_counter()
            calm = (await draw(engine, [prompt], tokens))[0]
            after_s = stream.uniform(0.0, time.perf_counter() - started)
            victim = f"stage-{stream.randrange(3)}"
            asyncio.get_running_loop().call_later(after_s, _kill, victim)
            times, found = [time.perf_counter()], None
            async with aclosing(engine.draws(SampleRequest(prompt, params))) as draws:
                async for drawn in draws:
                    times.append(time.perf_counter())
                    found = drawn if isinstance(drawn, Completion) else found
            assert found is not None
            pause_s = max(b - a for a, b in pairwise(times))
            rows.append({
                "part": "failover", "killed": victim, "after_s": after_s, "pause_s": pause_s, "finish": found.finish,
                "same": found.token_ids == calm.token_ids,
            })  # fmt: skip
            pairs.append((prompt, calm, found))
            print(f"failover: {rows[-1]}", file=sys.stderr, flush=True)
            await ready(served, 3)
    return rows, pairs


def _kill(name: str) -> None:
    for pid in children():
        if f"\0{name}\0" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            return
    raise RunError(f"there is no process {name}.")


def children() -> list[int]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for threads in found for pid in threads.read_text().split()]


def processor_s() -> float:
    """What this process and its children have used so far: unlike time, little disturbed by what else runs."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for pid in children():
        used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += sum(map(int, used)) / ticks
    return total


async def delayed(model: LocalModel, texts: Sequence[str], *, threads: int, rounds: int, tokens: int) -> dict[str, Any]:
    """A requester with one stage beside it, and two stages elsewhere; every link between machines takes `LINK_S`."""
    half_ms = 1000 * LINK_S / 2
    network = Network(nodes=tuple(Node(name=name, delay_ms=half_ms) for name in ("home", "one", "two")), tick_ms=0.1)
    async with packet_lab(network) as lab:
        asked = {"model": str(model.directory), "texts": list(texts), "threads": threads, "rounds": rounds}
        asked["tokens"] = tokens
        script = [sys.executable, str(Path(__file__)), lab.address("home"), json.dumps(asked)]
        requester = await lab.run("home", script, stdout=asyncio.subprocess.PIPE)
        assert requester.stdout is not None
        async with asyncio.timeout(START_S):
            ticket = (await requester.stdout.readline()).decode().strip()
        for name in ("one", "two"):
            worker = [sys.executable, "-m", "shoal.cli", "worker", ticket, "--stage", "--name", name]
            worker += ["--stage-host", lab.address(name), "--threads", str(threads), "--device", "cpu"]
            # The weights' way is not what is measured.
            await lab.run(name, [*worker, "--local-model", str(model.directory)])
        async with asyncio.timeout(3 * START_S):
            line = await requester.stdout.readline()
            if not line:
                raise RunError("the requester ended.", "See what it said above.")
            found: dict[str, Any] = json.loads(line)
            await requester.wait()
    return found


async def _requester(host: str, asked: dict[str, Any]) -> None:
    model = LocalModel("delayed", Path(asked["model"]))
    threads, tokens = asked["threads"], asked["tokens"]
    with_stages = settings(3, threads, "bf16", local_stages=1, stage_host=host)
    alone, one, sixteen = [], [], []
    async with (
        local_engine(model, threads, "bf16") as local,
        serving_over(model, "delayed", with_stages) as served,
    ):
        print(served.ticket, flush=True)
        engine = served.engine
        local.tokenizer.end_ids = engine.tokenizer.end_ids = frozenset()
        prompts = prompts_of(local, asked["texts"])
        await ready(served, 3)
        for engine_ in (local, engine):
            await draw(engine_, prompts[:1], 4)
        await draw(engine, prompts[:16], 4)
        for _ in range(asked["rounds"]):
            alone.append(await token_s(local, prompts[:1], tokens))
            one.append(await token_s(engine, prompts[:1], tokens))
            sixteen.append(await token_s(engine, prompts[:16], tokens))
        order = nodes(served)
        await draw(engine, prompts[:1], 4)
        round_s, busy_s = engine.last_round
    found = {"alone_s": alone, "one_s": one, "sixteen_s": sixteen, "nodes": order, "lanes": len(engine.lanes)}
    print(json.dumps({**found, "round_s": round_s, "busy_s": busy_s}), flush=True)


if __name__ == "__main__":
    asyncio.run(_requester(sys.argv[1], json.loads(sys.argv[2])))
