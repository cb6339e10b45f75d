"""A training run in a packet lab: everybody behind a masquerading NAT of their own, and routers in public.

    home (coordinator, learner) ─▶ NAT ─┐                       ┌─ NAT ◀─ worker-0
                                        ├─▶ router-0 … ◀────────┼─ NAT ◀─ worker-1 …
    watcher (a light node) ─────▶ NAT ─┘                        └─ …

All of it are the commands that users type, in processes of their own; the model is tiny, so that a run takes seconds
and what is measured is the network's part. The questions are sums, each with a mark that appears nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import tomli_w
from msgspec.structs import replace

from _plaintext import Plant
from shoal.errors import RunError
from shoal.fabric.ticket import RouterAddress
from shoal.lab.network import NatKind, Network, Node
from shoal.lab.packet import PacketLab, own_environment

SHOAL = [sys.executable, "-m", "shoal.cli"]
TAP, WATCHER, CONTROL = (Path(__file__).with_name(f"_{name}.py") for name in ("tap", "watcher", "control"))

ROUTER_PORT = 7447
TAPPED_PORT = 7448
"""Where a router listens that has a tap before it, which then takes the router's port."""

START_S = 120.0
"""A small process has said what it has to say by then."""

NUM_QUESTIONS = 96
MARK_CHARS = 24

GROUP_SIZE, GROUPS_PER_STEP = 8, 5

LOOK_S = 0.05
"""How often files are looked at that tell how a run goes on."""

MAX_LOG_TAIL_CHARS = 1500


def network(num_workers: int, num_routers: int, down_mbps: float = 100.0) -> Network:
    """Public routers, and homes with ordinary links behind NATs of both kinds."""
    nats: tuple[NatKind, NatKind] = ("cone", "symmetric")
    routers = [Node(name=f"router-{n}", up_mbps=500, down_mbps=500, delay_ms=2) for n in range(num_routers)]
    workers = [
        Node(name=f"worker-{n}", up_mbps=20, down_mbps=down_mbps, delay_ms=8 + 4 * n, jitter_ms=1, nat=nats[n % 2])
        for n in range(num_workers)
    ]
    return Network(
        nodes=(
            *routers,
            Node(name="home", up_mbps=50, down_mbps=200, delay_ms=8, nat="cone"),
            Node(name="watcher", up_mbps=20, down_mbps=100, delay_ms=10, nat="symmetric"),
            *workers,
        )
    )


class NatRun:
    """A lab with one run, inside `async with`; leaving it ends every process.

    Args:
        folder: for the run, logs, keys; a new one.
        model: directory of the tiny model.
        steps: optimizer steps of the run.
        down_mbps: each worker's downlink.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        steps: int,
        num_workers: int = 5,
        num_routers: int = 1,
        down_mbps: float = 100.0,
    ) -> None:
        self.folder = folder
        self.path = folder / "runs" / "nat"
        """The run's own folder."""
        self.num_workers = num_workers
        self.num_routers = num_routers
        self.lab = PacketLab(network(num_workers, num_routers, down_mbps))
        self.processes: dict[str, Process] = {}
        self.marks: dict[str, list[str]] = {}
        """Planted texts by kind."""
        self._model = model
        self._steps = steps
        self._random = random.Random(0)
        self._lines: dict[int, str] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True)
        await self._stack.enter_async_context(self.lab)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # Processes

    async def start(self, node: str, name: str, argv: Sequence[str | Path], stdout: int | None = None) -> Process:
        """A process at a node; what it says goes to `NAME.log`."""
        environment = own_environment() | {
            "SHOAL_HOME": str(self.folder / f"{node}-home"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_COLOR": "1",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            output = log.fileno() if stdout is None else stdout
            process = await self.lab.run(
                node, argv, env=environment, cwd=self.folder, stdout=output, stderr=log.fileno()
            )
        self.processes[name] = process
        return process

    async def start_router(self, number: int, *, tap: Path | None = None) -> None:
        """Start (again) a router; with `tap`, what it could read goes into that folder."""
        name = f"router-{number}"
        host, port = ("127.0.0.1", TAPPED_PORT) if tap is not None else (self.lab.address(name), ROUTER_PORT)
        argv: list[str | Path] = [
            *SHOAL,
            "router",
            "--host",
            host,
            "--port",
            str(port),
            "--identity",
            self._router_key(number),
            "--json",
        ]
        router = await self.start(name, name, argv, stdout=PIPE)
        address = RouterAddress.decode(str(json.loads(await self._said(router, name))["line"]))
        if tap is not None:
            address = replace(address, hosts=(f"{self.lab.address(name)}:{ROUTER_PORT}",))
            await self.start_tap(number, tap)
        self._lines[number] = address.encode()

    async def start_tap(self, number: int, folder: Path) -> None:
        """A tap before a router that was started with one."""
        name = f"router-{number}"
        argv: list[str | Path] = [
            sys.executable,
            TAP,
            self._router_key(number),
            self.lab.address(name),
            str(ROUTER_PORT),
        ]
        argv += ["127.0.0.1", str(TAPPED_PORT), folder]
        await self._said(await self.start(name, f"tap-{number}", argv, stdout=PIPE), f"tap-{number}")

    async def stop_tap(self, number: int) -> None:
        """End a tap.

        Raises:
            RunError: it could not keep all that went by.
        """
        tap = self.processes.pop(f"tap-{number}")
        tap.terminate()
        if await tap.wait() != 0:
            raise RunError("The tap could not keep all that went by.", "Give its folder more room.")

    def _router_key(self, number: int) -> Path:
        return self.folder / f"router-{number}-key"

    async def start_training(self) -> None:
        """Coordinator and learner at home; returns once the ticket is written."""
        config = self.folder / "nat.toml"
        config.write_text(tomli_w.dumps(self._config()))
        await self.start("home", "train", [*SHOAL, "train", config])
        await self.until((self.path / "ticket.txt").exists, START_S, "the run's ticket")

    async def start_worker(self, number: int) -> None:
        """A worker behind its own NAT, with the run's ticket."""
        name = f"worker-{number}"
        argv: list[str | Path] = [*SHOAL, "worker", self.path / "ticket.txt", "--name", name, "--device", "cpu"]
        argv += ["--max-sequences", "16", "--cache-tokens", "4096"]
        await self.start(name, name, argv)

    async def start_watcher(self) -> None:
        """A light node that says whom its roster shows."""
        argv: list[str | Path] = [sys.executable, WATCHER, self.path / "ticket.txt", self.folder / "roster.jsonl"]
        await self.start("watcher", "watcher", argv)

    async def say_aloud(self, plant: Plant) -> None:
        """Publish a plant through the router, unsealed, from one node of the lab to itself."""
        patterns = [pattern for kind in plant.patterns.values() for pattern in sorted(kind)]
        file = self.folder / "aloud"
        file.write_bytes(msgspec.msgpack.encode(patterns))
        speaker = await self.start(
            "watcher", "aloud", [sys.executable, CONTROL, self.path / "ticket.txt", file], stdout=PIPE
        )
        num_heard = int(await self._said(speaker, "aloud"))
        if num_heard != len(patterns):
            raise RunError(f"Of {len(patterns)} patterns said aloud, {num_heard} arrived.", "Is the machine too busy?")

    async def router_bytes(self) -> dict[str, int]:
        """Bytes that each router has sent and received."""
        nodes = (await self.lab.statistics()).nodes
        return {name: node.up.bytes + node.down.bytes for name, node in nodes.items() if name.startswith("router-")}

    async def kill(self, name: str) -> float:
        """Kill -9; gives the time, Unix seconds."""
        process = self.processes.pop(name)
        killed_at = time.time()
        process.kill()
        await process.wait()
        return killed_at

    async def until(self, condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
        """Wait for something of the run and give it.

        Raises:
            RunError: it did not happen in time, or the run's process ended first.
        """
        deadline = time.monotonic() + deadline_s
        while not (found := condition()):
            ended = self.processes["train"].returncode is not None
            if (ended and not condition()) or time.monotonic() > deadline:
                why = "the run's process ended" if ended else f"it took more than {deadline_s:g} s"
                raise RunError(f"No {what}: {why}.", f"What was said last:\n{self.tails()}")
            await asyncio.sleep(LOOK_S)
        return found

    def tails(self) -> str:
        """The end of every log."""
        logs = [*self.folder.glob("*.log"), *(self.path / "logs").glob("*.log")]
        return "\n".join(f"== {log.name}\n{log.read_text()[-MAX_LOG_TAIL_CHARS:]}" for log in sorted(logs))

    async def _said(self, process: Process, name: str) -> str:
        """All that a process says at its start: one line, or one JSON object over several."""
        assert process.stdout is not None
        said = ""
        async with asyncio.timeout(START_S):
            while line := (await process.stdout.readline()).decode():
                said += line
                if said.count("{") == said.count("}"):
                    return said
        raise RunError(f"{name} ended at once.", f"What was said last:\n{self.tails()}")

    # What the run is, and how it goes on

    def _config(self) -> dict[str, Any]:
        return {
            "run": {"name": "nat", "dir": str(self.path.parent), "steps": self._steps},
            "model": {"name": str(self._model), "dtype": "fp32", "context_tokens": 160},
            "envs": {
                "sums": {
                    "type": "jsonl",
                    "weight": 4.0,
                    "settings": {"path": str(self._sums()), "reward": "lenient"},
                },
                "words": {"type": "jsonl", "settings": {"path": str(self._words()), "grader": "exact"}},
            },
            "rollout": {
                "group_size": GROUP_SIZE,
                "groups_per_step": GROUPS_PER_STEP,
                "max_tokens": 32,
                "lease_timeout_s": 10.0,
            },
            "learner": {"mode": "async", "max_staleness": 2, "lr": 1e-3, "device": "cpu", "checkpoint_every": 10},
            "workers": {"count": 0},
            "network": {"routers": [self._lines[number] for number in range(self.num_routers)]},
            "eval": {"questions": 16, "max_tokens": 8, "before": False},
            "output": {"plots": False},
        }

    def _sums(self) -> Path:
        """Sums with one digit, which even a model that knows nothing hits now and then."""
        marks = [self._mark("prompts") for _ in range(NUM_QUESTIONS)]
        pairs = [(self._random.randrange(5), self._random.randrange(5)) for _ in marks]
        rows = [
            {"question": f"{a}+{b}=? ({mark})", "answer": str(a + b)} for (a, b), mark in zip(pairs, marks, strict=True)
        ]
        return self._write_rows("sums", rows)

    def _words(self) -> Path:
        """Questions whose answers are marks themselves."""
        rows = [{"question": self._mark("prompts"), "answer": self._mark("answers")} for _ in range(NUM_QUESTIONS // 4)]
        return self._write_rows("words", rows)

    def _write_rows(self, name: str, rows: list[dict[str, str]]) -> Path:
        # The path is part of the work spec, which every worker gets when it joins.
        path = self.folder / self._mark("work_spec") / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _mark(self, kind: str) -> str:
        mark = "".join(self._random.choices(string.ascii_lowercase + string.digits, k=MARK_CHARS))
        self.marks.setdefault(kind, []).append(mark)
        return mark

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.path / "metrics.jsonl") if line["kind"] == "step"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.path / "events.jsonl") if event["kind"] == kind]

    async def joined(self, deadline_s: float, since: float = 0.0) -> dict[str, str]:
        """Wait until every worker has joined after `since`; gives their node ids by name."""

        def find() -> dict[str, str] | None:
            joined = [event for event in self.events("node.joined") if event["time"] > since]
            ids = {event["data"]["name"]: event["node"] for event in joined}
            workers = {name: id for name, id in ids.items() if name.startswith("worker-")}
            return workers if len(workers) == self.num_workers else None

        found: dict[str, str] = await self.until(find, deadline_s, f"{self.num_workers} workers")
        return found

    def left_at(self, node_id: str, since: float) -> float | None:
        """When the coordinator noticed, after `since`, that a node was gone."""
        return next((e["time"] for e in self.events("node.left") if e["node"] == node_id and e["time"] > since), None)

    def is_here(self, node_id: str) -> bool:
        """Whether the watcher's roster shows a node."""
        views = self._views()
        return bool(views) and node_id in views[-1]["here"]

    def vanished_at(self, node_id: str, since: float) -> float | None:
        """When the watcher's roster, after `since`, no longer showed a node."""
        return next(
            (view["time"] for view in self._views() if view["time"] > since and node_id not in view["here"]), None
        )

    def _views(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "roster.jsonl")

    def summary(self) -> dict[str, Any] | None:
        """Written at the very end."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None


class Pulse:
    """When a run got on, inside `with`: its journal has a line for each group that begins or ends (lost: none)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.grown_at: list[float] = []
        """Unix seconds."""
        self._task: asyncio.Task[None] | None = None

    async def _look(self) -> None:
        num_lines = 0
        while True:
            journal = self._file.read_bytes() if self._file.exists() else b""
            now = journal.count(b"\n") - journal.count(b'"lost"')
            if now > num_lines:
                num_lines = now
                self.grown_at.append(time.time())
            await asyncio.sleep(LOOK_S)

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._look())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file that may still be written to."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def tiny_model(folder: Path) -> Path:
    """The model that the tests train, two layers over single characters."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    try:
        from tiny import make_tiny_model
    except ImportError as error:
        raise RunError(
            f"The tiny model cannot be made: {error}.", "Run from a checkout: pip install -e '.[dev]'"
        ) from None
    return Path(make_tiny_model(folder))
