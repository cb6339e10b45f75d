"""A swarm that trains, serves and broadcasts at once, in a packet lab, each node with a disk of its own.

    home (coordinator, learner) ─▶ NAT ─┐                    ┌────── worker-0 (a relay of snapshots)
                                        ├─▶ router-0, -1 ◀───┼ NAT ◀ worker-1
    server (follows the run) ───▶ NAT ──┘                    └ …
      └─ clients, on the server's own loopback

All of it are the commands that users type. A part that ends, of itself or because it was killed, is started again, as
a service manager would (`Keeper`); the run's own learner is started again by the run.

Times are on the machine's monotonic clock, which all processes share. Whoever leaves the context ends every process
and unmounts every disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import tomli_w

from _chaos_checks import Ended, Mark, Request
from _chaos_disk import Disk
from _chaos_keeper import Keeper, Launch
from _chaos_script import DISKS
from _nat import SHOAL
from shoal.coordinator.journal import JOURNAL
from shoal.coordinator.processes import child_of_this
from shoal.errors import RunError
from shoal.lab.network import Network, Node
from shoal.lab.packet import PacketLab, own_environment

BENCHMARKS = Path(__file__).parent
CLIENT, INSIDE = BENCHMARKS / "_chaos_client.py", BENCHMARKS / "_chaos_inside.py"

ROUTER_PORT, API_PORT = 7447, 8100
MODEL = "policy"

STALENESS = 2
DEADLINE_S = 30.0
"""Within it the server answers or refuses; a healthy one needs a fraction of a second."""

START_S = 120.0
LOOK_S = 0.05
ORPHAN_S = 15.0
TAIL_CHARS = 1500

SUBMITTED = re.compile(rb"group (g\d+): (\d+) accepted$", re.MULTILINE)


def network(seed: int) -> Network:
    """Two public routers; everybody else reaches only them."""
    links: dict[str, Any] = {"up_mbps": 100, "down_mbps": 100}
    return Network(
        nodes=(
            Node(name="router-0", **links, delay_ms=1),
            Node(name="router-1", **links, delay_ms=2),
            Node(name="home", **links, delay_ms=4, nat="cone"),
            Node(name="worker-0", **links, delay_ms=6),
            Node(name="worker-1", **links, delay_ms=8, nat="symmetric"),
            Node(name="server", **links, delay_ms=5, nat="cone"),
        ),
        seed=seed,
        tick_ms=2.0,
    )


class Swarm:
    """All parts of one run, inside `async with`.

    Args:
        folder: for disks, logs and keys; an empty one.
        model: directory of the tiny model.
        preload: environment of the processes of some nodes, such as another clock's.
    """

    def __init__(self, folder: Path, model: Path, seed: int, preload: Mapping[str, Mapping[str, str]]) -> None:
        self.folder = folder
        self.lab = PacketLab(network(seed))
        self.disks = {name: Disk(folder / "disks" / name) for name in DISKS}
        self.run = self.disks["home"].path / "runs" / "chaos"
        """The run's own folder."""
        self.keepers: dict[str, Keeper] = {}
        self.marks: list[Mark] = []
        self.orphans: dict[int, str] = {}
        """Children of a killed coordinator that outlived it."""
        self._model, self._preload = model, preload
        self._lines: dict[str, str] = {}
        self._watch: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            for disk in self.disks.values():
                self._stack.push_async_callback(disk.close)
                await disk.open()
            self._stack.callback(self._keep_record)
            await self._stack.enter_async_context(self.lab)
            self._stack.push_async_callback(self._stop_keeping)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _keep_record(self) -> None:
        """What the run wrote down, beside the logs: its disk goes."""
        ignored = shutil.ignore_patterns("checkpoints", "chunks", "model", "ballast")
        if self.run.exists():
            shutil.copytree(self.run, self.folder / "run", ignore=ignored)

    async def _stop_keeping(self) -> None:
        for keeper in self.keepers.values():
            await keeper.stop()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    # Processes

    async def start(self) -> None:
        """Everything, up to a run that steps and a server that answers.

        Raises:
            RunError: it does not come to that.
        """
        for name in ("router-0", "router-1"):
            self._keep(name, partial(self._launch_router, name))
        await self.until(lambda: len(self._lines) == 2, START_S, "two routers")
        config = self.folder / "chaos.toml"
        config.write_text(tomli_w.dumps(self._config()))
        self._keep("coordinator", lambda: self._launch_coordinator(config))
        self._watch = asyncio.create_task(self._look())
        ticket = self.run / "ticket.txt"
        await self.until(ticket.exists, START_S, "the run's ticket")
        kept = self.folder / "ticket.txt"
        kept.write_text(ticket.read_text())  # nodes elsewhere were given it; it doesn't lie on the coordinator's disk
        serve: list[str | Path] = [
            *SHOAL,
            "serve",
            kept,
            "--follow",
            "--host",
            "127.0.0.1",
            "--port",
            str(API_PORT),
            "--name",
            MODEL,
        ]
        serve += ["--device", "cpu", "--context-tokens", "96", "--json"]
        self._keep("server", lambda: self._launch("server", "server", serve))
        work = ["--device", "cpu", "--max-sequences", "16", "--cache-tokens", "2048", "--grace", "2"]
        for name in ("worker-0", "worker-1"):
            relay = ["--relay", self.lab.address(name)] if name == "worker-0" else []
            argv: list[str | Path] = [*SHOAL, "worker", kept, "--name", name, *work, *relay]
            self._keep(name, partial(self._launch, name, name, argv))
        await self.until(lambda: self.count("step") >= 1, START_S, "the first step")
        url = f"http://127.0.0.1:{API_PORT}/v1"
        client: list[str | Path] = [sys.executable, CLIENT, url, MODEL, self.requests_file, str(DEADLINE_S)]
        self._keep("client", lambda: self._launch("server", "client", client, child_of_this()))
        await self.until(lambda: any(r.outcome == "answered" for r in self.requests()), START_S, "the first answer")

    def _keep(self, name: str, launch: Launch) -> None:
        self.keepers[name] = Keeper(name, launch)
        self.keepers[name].start()

    async def _launch(
        self,
        node: str,
        name: str,
        argv: Sequence[str | Path],
        extra: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> Process:
        """A process at a node; what it says goes to `NAME.log`, which is not on the node's disk."""
        home = self.disks[node].path if node in self.disks else self.folder / f"{node}-home"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        environment = own_environment() | {
            "SHOAL_HOME": str(home / "shoal"),
            "TMPDIR": str(home / "tmp"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_COLOR": "1",
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment["PYTHONPATH"]])
        environment |= {**self._preload.get(node, {}), **(extra or {})}
        with (self.folder / f"{name}.log").open("ab") as log:
            return await self.lab.run(
                node, argv, env=environment, cwd=self.folder, stdout=stdout or log.fileno(), stderr=log.fileno()
            )

    async def _launch_router(self, name: str) -> Process:
        argv: list[str | Path] = [*SHOAL, "router", "--host", self.lab.address(name), "--port", str(ROUTER_PORT)]
        argv += ["--identity", self.folder / f"{name}-key", "--json"]
        router = await self._launch(name, name, argv, stdout=PIPE)
        assert router.stdout is not None
        said = ""
        async with asyncio.timeout(START_S):
            while line := (await router.stdout.readline()).decode():
                said += line
                if said.count("{") == said.count("}"):
                    self._lines[name] = str(json.loads(said)["line"])
                    break
        return router

    async def _launch_coordinator(self, config: Path) -> Process:
        how: list[str | Path] = ["--resume", self.run] if (self.run / "events.jsonl").exists() else [config]
        return await self._launch("home", "coordinator", [*SHOAL, "train", *how, "--json"])

    async def inside(self, node: str, *arguments: str) -> Process:
        """Something that goes wrong with a node's packets or ports, in effect on return; it ends on SIGTERM."""
        process = await self._launch(
            node, f"inside-{node}", [sys.executable, INSIDE, *arguments], child_of_this(), stdout=PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            if await process.stdout.readline() != b"ready\n":
                raise RunError(f"{arguments} at {node} cannot be done.", f"What was said last:\n{self.tails()}")
        return process

    def children(self) -> dict[int, str]:
        """What each child of the coordinator is, by process id: its first words."""
        found = {}
        pid = self.keepers["coordinator"].pid
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                with contextlib.suppress(OSError):
                    found[int(child)] = " ".join(Path(f"/proc/{child}/cmdline").read_text().split("\0")[2:5])
        return found

    def pid(self, part: str) -> int | None:
        """Of a part's process now, if it lives."""
        if part == "learner":
            return next((pid for pid, words in self.children().items() if "_learner" in words), None)
        return self.keepers[part].pid

    async def kill(self, part: str) -> bool:
        """Kill -9; whether there was anything to kill. A coordinator's children must end by themselves."""
        pid = self.pid(part)
        if pid is None:
            return False
        children = self.children() if part == "coordinator" else {}
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(RunError):
            await self.until(lambda: not any(map(is_alive, children)), ORPHAN_S, "end of its children")
        self.orphans |= {child: what for child, what in children.items() if is_alive(child)}
        return True

    def is_reached(self, router: str) -> bool:
        """Whether every node that dials has a connection to this router."""
        address = self.lab.public_address(router)
        wanted = "".join(f"{int(byte):02X}" for byte in reversed(address.split("."))) + f":{ROUTER_PORT:04X}"
        for part in ("coordinator", "worker-0", "worker-1", "server"):
            pid = self.pid(part)
            with contextlib.suppress(OSError):
                rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
                if pid is not None and not any(row[2] == wanted and row[3] == "01" for row in rows):
                    return False
        return True

    # How it goes on

    def _config(self) -> dict[str, Any]:
        sums = {"type": "_chaos_world:SlowArithmetic", "settings": {"add": [0, 6], "reward": "lenient"}}
        return {
            "run": {"name": "chaos", "dir": str(self.run.parent), "steps": 1_000_000},
            "model": {"name": str(self._model), "dtype": "fp32", "context_tokens": 96},
            "envs": {"sums": sums},
            "rollout": {"group_size": 8, "groups_per_step": 2, "max_tokens": 8, "lease_timeout_s": 10.0},
            "learner": {
                "mode": "async",
                "max_staleness": STALENESS,
                "lr": 1e-3,
                "device": "cpu",
                "checkpoint_every": 3,
            },
            "workers": {"count": 0},
            "trust": {"probation": 8},
            "network": {"routers": [self._lines[name] for name in sorted(self._lines)], "ticket_uses": 4096},
            "eval": {"questions": 1, "max_tokens": 8, "before": False},
            "output": {"plots": False},
        }

    async def _look(self) -> None:
        """Mark each group that is started or accepted, each step, and each submission that a worker had accepted."""
        files = {
            self.run / JOURNAL: {b'"start"': "start", b'"accept"': "accept"},
            self.run / "metrics.jsonl": {b'"kind":"step"': "step"},
            self.folder / "worker-0.log": {b" accepted": "worker-0"},
            self.folder / "worker-1.log": {b" accepted": "worker-1"},
        }
        seen = dict.fromkeys(files, 0)
        while True:
            for path, words in files.items():
                with contextlib.suppress(OSError), path.open("rb") as file:
                    file.seek(seen[path])
                    new = file.read().rpartition(b"\n")[0]
                    seen[path] += len(new)
                    now = time.monotonic()
                    self.marks += [Mark(now, what) for word, what in words.items() for _ in range(new.count(word))]
            await asyncio.sleep(LOOK_S)

    def count(self, what: str, since_s: float = 0.0) -> int:
        return sum(mark.what == what and mark.at_s > since_s for mark in self.marks)

    @property
    def requests_file(self) -> Path:
        return self.folder / "requests.jsonl"

    def requests(self) -> list[Request]:
        """What the clients have written down so far."""
        data = self.requests_file.read_bytes() if self.requests_file.exists() else b""
        lines = data.splitlines(keepends=True)
        return [msgspec.json.decode(line, type=Request) for line in lines if line.endswith(b"\n")]

    def acknowledged(self) -> set[str]:
        """Groups that workers were told are accepted."""
        logs = [self.folder / f"{name}.log" for name in ("worker-0", "worker-1")]
        return {found[0].decode() for log in logs if log.exists() for found in SUBMITTED.findall(log.read_bytes())}

    def scratch(self, nodes: Sequence[str]) -> list[str]:
        """What lies in the folders where these nodes keep snapshots while they need them."""
        kept = [path for node in nodes for path in self.disks[node].path.glob("shoal/snapshots/*")]
        return [str(path.relative_to(self.folder)) for path in kept]

    async def until(self, condition: Callable[[], Any], deadline_s: float, what: str) -> None:
        """Wait for something.

        Raises:
            RunError: it did not happen in time.
        """
        deadline = time.monotonic() + deadline_s
        while not condition():
            broken = [problem for keeper in self.keepers.values() if (problem := keeper.problem)]
            if broken or time.monotonic() > deadline:
                why = broken[0] if broken else f"it took more than {deadline_s:g} s"
                raise RunError(f"No {what}: {why}.", f"What was said last:\n{self.tails()}")
            await asyncio.sleep(LOOK_S)

    def logs(self) -> dict[str, str]:
        """All that was said, by name of the process."""
        paths = [*self.folder.glob("*.log"), *(self.run / "logs").glob("*.log")]
        return {path.stem: path.read_text(errors="replace") for path in sorted(paths)}

    def tails(self) -> str:
        return "\n".join(f"== {name}\n{text[-TAIL_CHARS:]}" for name, text in self.logs().items())

    async def end(self) -> list[Ended]:
        """Tell everything to end, clients first and routers last."""
        order = (("client",), ("worker-0", "worker-1", "server"), ("coordinator",), ("router-0", "router-1"))
        ends: list[Ended] = []
        for names in order:
            known = [self.keepers[name] for name in names if name in self.keepers]
            ends += await asyncio.gather(*(keeper.end() for keeper in known))
        return ends


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
