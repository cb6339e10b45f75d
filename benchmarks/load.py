"""What a server does at twice its capacity, and what a coordinator does with two hundred workers.

Parts (`--only`), real processes on loopback:

    api        `shoal serve` of a tiny model. Capacity: the answers a second that eight clients get, whose completions
               it draws all at once. Then requests come at twice that rate, whatever becomes of those before; who is
               answered 429 waits as long as Retry-After says and asks again, twice, as OpenAI's own client does.
               `goodput_2x_over_1x`: answers a second that come within 10 s, over the capacity
    workers    a run with 200 light workers: real ones (a key, a session, leases, an engine, submissions), in eight
               processes of 25, all of a tiny model. How long the coordinator takes to answer, and whether it kept its
               promises (the audit of the run's folder)

Some four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import tomli_w

from _nat import SHOAL, read_lines, tiny_model
from _soak_growth import sample
from join import until_told
from shoal.coordinator.audit import audit
from shoal.coordinator.processes import child_of_this
from shoal.errors import RunError
from shoal.lab.packet import own_environment

from _common import benchmark, emit

COMPLETIONS = 4
"""Of each request, so that what is measured is the server's drawing and not the clients' asking."""

CLIENTS = 8
AT_ONCE, WAITING = CLIENTS * COMPLETIONS, CLIENTS * COMPLETIONS
"""Completions that the server draws at once, and that may wait; the rest is turned away."""

MAX_TOKENS = 64
GOOD_S = 10.0
"""An answer that comes later does no good."""

RETRIES = 2
WARM_S = 5.0
START_S = 240.0
END_S = 60.0

WORKERS_A_PROCESS = 25
STALENESS = 2


class Part(NamedTuple):
    """What one part gives."""

    rows: list[dict[str, Any]]
    headline: dict[str, float]


def say(text: str) -> None:
    print(f"load: {text}", file=sys.stderr, flush=True)


@asynccontextmanager
async def process(
    folder: Path, name: str, argv: Sequence[str | Path], stdout: int | None = None
) -> AsyncIterator[Process]:
    """A process while inside, told to end on leaving; what it says goes to `NAME.log`.

    Raises:
        RunError: it does not end.
    """
    environment = own_environment() | child_of_this()
    environment |= {"SHOAL_HOME": str(folder / "home" / name), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with (folder / f"{name}.log").open("ab") as log:
        made = await asyncio.create_subprocess_exec(
            *map(str, argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout or log.fileno(),
            stderr=log.fileno(),
            env=environment,
            limit=2**26,
            start_new_session=True,
        )
    try:
        yield made
    finally:
        if made.returncode is None:
            made.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(made.wait(), END_S)
            except TimeoutError:
                made.kill()
                await made.wait()
                raise RunError(f"{name} did not end.", f"Its log is {folder / name}.log.") from None


async def until(condition: Callable[[], bool], watched: Process, what: str) -> None:
    """Wait for something while a process lives.

    Raises:
        RunError: it did not happen in time, or the process ended.
    """
    deadline = time.monotonic() + START_S
    while not condition():
        if watched.returncode is not None or time.monotonic() > deadline:
            raise RunError(f"No {what}.", "The logs above say why.")
        await asyncio.sleep(0.1)


class Callers:
    """Clients of one server, and what came of their requests."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.good_s: list[float] = []
        """When an answer came that was in time."""
        self.took_s: list[float] = []
        self._http, self._url = http, url
        self._asked = 0

    async def ask(self) -> None:
        """One request, asked again where the server says when."""
        self._asked += 1
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"{self._asked % 10}?"}],
            "max_tokens": MAX_TOKENS,
            "n": COMPLETIONS,
            "temperature": 1,
            "seed": self._asked,
        }
        began_s = time.monotonic()
        outcome = "refused"
        for _ in range(RETRIES + 1):
            try:
                response = await self._http.post(f"{self._url}/chat/completions", json=body)
            except httpx.TransportError as error:
                outcome = type(error).__name__
                break
            if response.status_code == 200:
                ended_s = time.monotonic()
                self.took_s.append(ended_s - began_s)
                outcome = "answered" if ended_s - began_s <= GOOD_S else "late"
                if outcome == "answered":
                    self.good_s.append(ended_s)
                break
            if response.status_code != 429:
                outcome = f"status {response.status_code}"
                break
            self.outcomes["turned away"] += 1
            # A little later than told, each at its own time: not all at once.
            await asyncio.sleep(float(response.headers["retry-after"]) * random.uniform(1.0, 1.25))
        self.outcomes[outcome] += 1

    async def closed(self, clients: int, seconds: float) -> None:
        """So many clients, each of which asks again as soon as it is answered."""
        end_s = time.monotonic() + seconds

        async def one() -> None:
            while time.monotonic() < end_s:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(clients)))

    async def open(self, rate: float, seconds: float) -> None:
        """Requests at random moments, so many a second, whatever became of those before."""
        async with asyncio.TaskGroup() as group:
            at_s = time.monotonic()
            end_s = at_s + seconds
            while at_s < end_s:
                at_s += random.expovariate(rate)
                await asyncio.sleep(at_s - time.monotonic())
                group.create_task(self.ask())

    def rate(self, begin_s: float, seconds: float) -> float:
        """Good answers a second."""
        return sum(begin_s <= at_s < begin_s + seconds for at_s in self.good_s) / seconds


async def api(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """The server at its capacity, and at twice that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = {"max_sequences": AT_ONCE, "max_waiting": WAITING, "context_tokens": 128, "dtype": "fp32"}
    served = folder / "served"
    served.mkdir()
    (served / "model").symlink_to(model)
    envs = {"sums": {"type": "arithmetic", "settings": {}}}
    config = {"model": {"name": str(model)}, "envs": envs, "serving": serving | {"device": "cpu", "port": port}}
    (served / "config.toml").write_text(tomli_w.dumps(config))
    url = f"http://127.0.0.1:{port}/v1"
    rows: list[dict[str, Any]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with (
        process(folder, "server", [*SHOAL, "serve", served, "--name", "tiny", "--json"]) as server,
        httpx.AsyncClient(timeout=60, limits=limits) as http,
    ):
        await until(lambda: listens(port), server, "server")
        await Callers(http, url).closed(CLIENTS, WARM_S)

        async def measure(name: str, load: Callable[[Callers, float], Awaitable[None]]) -> float:
            callers = Callers(http, url)
            begin_s = time.monotonic()
            await load(callers, options.seconds + WARM_S)
            rate = callers.rate(begin_s + WARM_S, options.seconds)
            row = {"part": "api", "load": name, "good_per_s": round(rate, 2), **callers.outcomes}
            row["p50_s"] = round(statistics.median(callers.took_s), 3)
            row["longest_s"] = round(max(callers.took_s), 3)
            rows.append(row)
            say(json.dumps(row))
            return rate

        pairs = []
        for _ in range(options.rounds):
            once = await measure("1x", lambda callers, seconds: callers.closed(CLIENTS, seconds))
            twice = await measure("2x", lambda callers, seconds, rate=2 * once: callers.open(rate, seconds))  # type: ignore[misc]
            pairs.append((once, twice))
    known = ("answered", "refused", "turned away", "part", "load", "good_per_s", "p50_s", "longest_s")
    return Part(
        rows,
        {
            "capacity_per_s": round(statistics.median(once for once, _ in pairs), 2),
            "goodput_2x_over_1x": round(statistics.median(twice / once for once, twice in pairs), 3),
            "neither_answered_nor_refused": sum(n for row in rows for name, n in row.items() if name not in known),
            "longest_2x_s": max(row["longest_s"] for row in rows if row["load"] == "2x"),
        },
    )


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def workers(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """A run with many workers."""
    run = folder / "runs" / "load"
    config = folder / "load.toml"
    config.write_text(tomli_w.dumps(run_config(folder, model, options.workers)))
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        train = await stack.enter_async_context(process(folder, "train", [*SHOAL, "train", config, "--json"]))
        await until((run / "own-ticket.txt").exists, train, "ticket")
        crowds = []
        for first in range(0, options.workers, WORKERS_A_PROCESS):
            count = min(WORKERS_A_PROCESS, options.workers - first)
            argv: list[str | Path] = [sys.executable, Path(__file__).with_name("_load_workers.py"), run / "ticket.txt"]
            argv += [run / "snapshots", str(first), str(count)]
            crowds.append(await stack.enter_async_context(process(folder, f"crowd-{first}", argv, stdout=PIPE)))
        async with asyncio.timeout(START_S):
            for crowd in crowds:
                if await said(crowd) != b"joined\n":
                    raise RunError("some workers did not join.", f"Their logs are in {folder}.")
        joined_s = time.monotonic() - began_s
        say(f"{options.workers} workers after {joined_s:.0f} s")
        steps, processor_s = count_of(run, "metrics.jsonl", b'"kind":"step"'), processor_of(train.pid)
        begin_s = time.monotonic()
        await asyncio.sleep(options.seconds)
        seconds = time.monotonic() - begin_s
        held = sample(train.pid, time.monotonic(), [])
        busy = (processor_of(train.pid) - processor_s) / seconds
        steps = count_of(run, "metrics.jsonl", b'"kind":"step"') - steps
        for crowd in crowds:
            crowd.send_signal(signal.SIGTERM)
        found = [dict(json.loads(await said(crowd))) for crowd in crowds]
    audited = audit(run, max_staleness=STALENESS)
    for problem in audited.problems:
        say(problem)
    rows = []
    for verb in ("lease", "heartbeat", "submit"):
        times = sorted(took for one in found for took in one["times"][verb])
        missed = sum(one["misses"][verb] for one in found)
        row = {"part": "workers", "request": verb, "count": len(times), "unanswered": missed}
        if times:
            row |= {"p50_s": statistics.median(times), "p99_s": times[int(0.99 * len(times))], "max_s": times[-1]}
        rows.append(row)
        say(json.dumps(row))
    submitted = [count for one in found for count in one["submitted"]]
    events = read_lines(run / "events.jsonl")
    return Part(
        rows,
        {
            "workers": options.workers,
            "workers_joined_s": round(joined_s, 1),
            "workers_contributing": sum(count > 0 for count in submitted),
            "workers_rollouts": sum(submitted),
            "workers_steps_per_s": round(steps / seconds, 3),
            "workers_unanswered": sum(row["unanswered"] for row in rows),
            "workers_heartbeat_p99_s": rows[1].get("p99_s", 0.0),
            "workers_lost_leases": sum(event["kind"] == "lease.expired" for event in events),
            "workers_broken_promises": 0 if audited.good else 1,
            "coordinator_mb": round(held.memory_mb, 1),
            "coordinator_core_share": round(busy, 3),
        },
    )


async def said(crowd: Process) -> bytes:
    assert crowd.stdout is not None
    async with asyncio.timeout(START_S):
        return await crowd.stdout.readline()


def count_of(run: Path, name: str, what: bytes) -> int:
    path = run / name
    return path.read_bytes().count(what) if path.exists() else 0


def processor_of(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def run_config(folder: Path, model: Path, num_workers: int) -> dict[str, Any]:
    """A run in which every worker has something to do, and the machine is not full of it."""
    sums = {"type": "arithmetic", "settings": {"add": [0, 6], "reward": "lenient"}}
    return {
        "run": {"name": "load", "dir": str(folder / "runs"), "steps": 1_000_000},
        "model": {"name": str(model), "dtype": "fp32", "context_tokens": 64},
        "envs": {"sums": sums},
        "rollout": {
            "group_size": 4,
            "groups_per_step": max(1, num_workers // 2),
            "max_tokens": 4,
            "lease_timeout_s": 60.0,
        },
        "learner": {"mode": "async", "max_staleness": STALENESS, "lr": 1e-4, "device": "cpu"},
        "workers": {"count": 0},
        "network": {"ticket_uses": 4096},
        "trust": {"probation": 0, "sample": 0.01},
        "eval": {"questions": 1, "max_tokens": 8, "before": False},
        "output": {"plots": False},
    }


PARTS: dict[str, Callable[[Path, Path, argparse.Namespace], Awaitable[Part]]] = {"api": api, "workers": workers}


async def measure_all(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {"load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="shoal-load-") as scratch:
        model = tiny_model(Path(scratch) / "model")
        for name in options.only:
            folder = Path(scratch) / name
            folder.mkdir()
            try:
                part = await PARTS[name](folder, model, options)
            except (RunError, TimeoutError):
                for log in sorted(folder.glob("*.log")):
                    say(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}")
                raise
            rows += part.rows
            headline |= part.headline
    emit(rows, headline)


def main() -> None:
    parser = argparse.ArgumentParser(prog="load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3, help="of the server's two loads, in turn")
    parser.add_argument("--workers", type=int, default=200)
    asyncio.run(until_told(measure_all(parser.parse_args())))


if __name__ == "__main__":
    benchmark(main)
