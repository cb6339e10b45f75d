"""One version from one node to many in a packet lab: Shoal and its peers, each node a process in its own namespace.

A `Setting` is a network and a file. `swarm` starts the lab, a source and nodes that are ready; `ours`, `file_tree` and
`torrent` spread the file and say how long the last node took, and what the machine and the network had to do for it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _usage import Processors, network_cost, segments
from shoal.lab.network import Network, Node
from shoal.lab.packet import PacketLab, own_environment, packet_lab
from shoal.planning.spreading import fluid_s, star_s

from _common import peer_env

SOURCE = "source"
START_S = 180.0
"""Interpreters start one after the other on few cores."""

LIBTORRENT = "libtorrent==2.1.1"

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A network and a file."""

    name: str
    num_bytes: int
    source_mbps: float
    up_mbps: tuple[float, ...]
    down_mbps: float
    delay_ms: float = 40.0

    @property
    def names(self) -> list[str]:
        return [f"n{i:02}" for i in range(len(self.up_mbps))]

    @property
    def network(self) -> Network:
        """Half of the delay on either side of the middle."""
        half = self.delay_ms / 2
        links = zip(self.names, self.up_mbps, strict=True)
        nodes = [Node(name=name, up_mbps=up, down_mbps=self.down_mbps, delay_ms=half) for name, up in links]
        source = Node(name=SOURCE, up_mbps=self.source_mbps, down_mbps=self.source_mbps, delay_ms=half)
        return Network(nodes=(source, *nodes), tick_ms=2.0)

    @property
    def fluid_s(self) -> float:
        rates = [125e3 * up for up in self.up_mbps]
        return fluid_s(self.num_bytes, 125e3 * self.source_mbps, rates, [125e3 * self.down_mbps] * len(rates))

    @property
    def star_s(self) -> float:
        return star_s(self.num_bytes, 125e3 * self.source_mbps, [125e3 * self.down_mbps] * len(self.up_mbps))


class Member:
    """A node's process and what it said."""

    def __init__(self, name: str, process: Process) -> None:
        self.name, self.process = name, process
        self.quarter = 0

    async def hear(self, key: str, timeout_s: float) -> Row:
        """Its next line that has `key`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            while line := await self.process.stdout.readline():
                said: Row = json.loads(line)
                self.quarter = max(self.quarter, said.get("quarter", 0))
                if key in said:
                    return said
        raise RuntimeError(f"{self.name} ended")

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")


class Swarm:
    """A lab with a source that has a version and nodes that are ready for it."""

    def __init__(self, setting: Setting, lab: PacketLab, scratch: str) -> None:
        self.setting, self.lab, self._scratch = setting, lab, scratch
        self.source: Member
        self.members: dict[str, Member] = {}
        self.links: dict[str, list[Any]] = {}
        """Host, port and key of each node's relay."""
        self.hash = ""
        """Of what the nodes are to load."""

    async def spawn(self, name: str, script: str, python: str = sys.executable, **task: Any) -> Member:
        """A process at a node."""
        here = Path(__file__).with_name(script)
        own = {"host": self.lab.address(name), "num_bytes": self.setting.num_bytes, "scratch": self._scratch}
        task = {**own, **task}
        argv = [python, here, json.dumps(task)]
        environment = {**own_environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = await self.lab.run(name, argv, env=environment, stdin=PIPE, stdout=PIPE)
        return Member(name, process)

    def timeout_s(self) -> float:
        return 60.0 + 4 * self.setting.star_s

    async def publish(self, version: int, *, nudge: bool = False) -> None:
        """Have the source write another version, of the same size; with `nudge` a little different from the last."""
        self.source.tell(publish=version, nudge=nudge)
        self.hash = (await self.source.hear("hash", START_S))["hash"]

    def go(self, version: int, *, without: tuple[str, ...] = ()) -> float:
        """Tell nodes that a version is there; gives the time."""
        started = time.time()
        for name, member in self.members.items():
            if name not in without:
                member.tell(go=version)
        return started

    async def finished(self, started: float, *, without: tuple[str, ...] = ()) -> dict[str, Row]:
        """What each node said when it was whole, with its seconds."""
        members = [member for name, member in self.members.items() if name not in without]
        said = await asyncio.gather(*(member.hear("whole_at", self.timeout_s()) for member in members))
        found = {}
        for member, words in zip(members, said, strict=True):
            if self.hash and words["hash"] and words["hash"] != self.hash:
                raise RuntimeError(f"{member.name} loaded something else")
            found[member.name] = {**words, "seconds": words["whole_at"] - started}
        return found


@asynccontextmanager
async def swarm(
    setting: Setting, *, relays: bool = True, tells_rates: bool = True, parts: Mapping[str, int] | None = None
) -> AsyncIterator[Swarm]:
    """Everybody there, and introduced.

    Args:
        relays: whether nodes pass chunks on.
        tells_rates: whether nodes know their links' rates; otherwise they measure them.
        parts: nodes that hold so many of the version's four tensors only; their hash is not checked.
    """
    # The lab kills what still runs; what it leaves in its folders goes with this one.
    with tempfile.TemporaryDirectory(prefix="shoal-swarm-", ignore_cleanup_errors=True) as scratch:
        async with packet_lab(setting.network) as lab:
            made = Swarm(setting, lab, scratch)
            await _start(made, relays=relays, tells_rates=tells_rates, parts=parts or {})
            yield made


async def _start(made: Swarm, *, relays: bool, tells_rates: bool, parts: Mapping[str, int]) -> None:
    """All processes, ready."""
    setting = made.setting

    def rates(up_mbps: float, down_mbps: float) -> Row:
        return {"up_mbps": up_mbps, "down_mbps": down_mbps} if tells_rates else {}

    own = rates(setting.source_mbps, setting.source_mbps)
    made.source = await made.spawn(SOURCE, "_broadcast_node.py", role="source", **own)
    said = await made.source.hear("ticket", START_S)
    made.hash = said["hash"]
    task = {"role": "worker", "ticket": said["ticket"], "relays": relays}
    for name, up in zip(setting.names, setting.up_mbps, strict=True):
        told = {**rates(up, setting.down_mbps), "holds": parts.get(name, 4)}
        made.members[name] = await made.spawn(name, "_broadcast_node.py", **task, **told)
    for name, member in made.members.items():
        ready = await member.hear("ready", START_S)
        made.links[name] = [*ready["link"], ready["key"]]


Fault = Callable[[Swarm], Awaitable[None]]


async def ours(
    setting: Setting, *, relays: bool = True, fault: Fault | None = None, victims: tuple[str, ...] = ()
) -> Row:
    """One version to all of them; `fault` happens meanwhile, and `victims` need not finish."""
    async with swarm(setting, relays=relays) as made:
        return await spread(made, fault=fault, victims=victims)


async def spread(made: Swarm, version: int = 1, *, fault: Fault | None = None, victims: tuple[str, ...] = ()) -> Row:
    """One version through a swarm that stands, with a time line."""
    setting = made.setting
    alive = [member.process.pid for name, member in made.members.items() if name not in victims]
    sent_before, again_before = segments([made.source.process.pid, *alive])
    processors = Processors()
    started = made.go(version)
    trouble = asyncio.ensure_future(fault(made)) if fault is not None else None
    found = await made.finished(started, without=victims)
    idle = processors.idle
    if trouble is not None:
        await trouble
    made.source.tell(report=True)
    sent = await made.source.hear("sent", 30)
    sent_now, again_now = segments([made.source.process.pid, *alive])
    seconds = [words["seconds"] for words in found.values()]
    return {
        "seconds": max(seconds),
        "first_s": min(seconds),
        "time_line_s": _time_line(started, found, sent),
        "source_sent_files": sum(sent["sent"].values()) / setting.num_bytes,
        "resent_share": (again_now - again_before) / max(1, sent_now - sent_before),
        "processors_idle": idle,
        "nodes_cpu_s": sum(words["cpu_s"] for words in found.values()),
        **await network_cost(made.lab, SOURCE, setting.num_bytes),
    }


def _time_line(started: float, found: dict[str, Row], sent: Row) -> dict[str, list[float]]:
    """Of each moment the first, the middle and the last node's, in seconds since the beginning."""

    def spread_of(moments: list[float]) -> list[float]:
        return [round(f(moments) - started, 2) for f in (min, statistics.median, max)]

    marks = [words["marks"] for words in found.values()]
    line = {f"{name} chunk": spread_of([m[name] for m in marks]) for name in ("first", "last")}
    quarters = {f"{n}/4": spread_of([m[str(n)] for m in marks]) for n in (1, 2, 3)}
    return {
        "first chunk": line["first chunk"],
        **quarters,
        "source has sent all": [round(sent["last_sent_at"] - started, 2)],
        "last chunk": line["last chunk"],
        "rebuilt": spread_of([words["whole_at"] for words in found.values()]),
    }


async def file_tree(setting: Setting, fan_out: int = 2) -> Row:
    """Each node takes the whole file from its parent, which has it by then; SHARDCAST's way of relaying."""
    async with swarm(setting, relays=False) as made:
        names = setting.names
        whole = [asyncio.Event() for _ in names]
        started = time.time()

        async def take(place: int) -> float:
            member = made.members[names[place]]
            if place < fan_out:
                member.tell(go=1)  # from the source
            else:
                parent = place // fan_out - 1
                await whole[parent].wait()
                member.tell(go=1, parent=made.links[names[parent]])
            said = await member.hear("whole_at", made.timeout_s())
            whole[place].set()
            return float(said["whole_at"]) - started

        seconds = await asyncio.gather(*(take(place) for place in range(len(names))))
        return {
            "seconds": max(seconds),
            "first_s": min(seconds),
            **await network_cost(made.lab, SOURCE, setting.num_bytes),
        }


async def torrent(setting: Setting) -> Row:
    """libtorrent; everybody is told of everybody, so no tracker delays it."""
    python = str(peer_env("libtorrent", [LIBTORRENT]))
    with tempfile.TemporaryDirectory(prefix="shoal-torrent-") as scratch:
        async with packet_lab(setting.network) as lab:
            made = Swarm(setting, lab, scratch)
            file = str(Path(scratch) / "w.torrent")
            addresses = {name: lab.public_address(name) for name in (SOURCE, *setting.names)}
            for name in addresses:
                task = {
                    "role": "source" if name == SOURCE else "worker",
                    "torrent": file,
                    "others": [address for other, address in addresses.items() if other != name],
                }
                member = await made.spawn(name, "_torrent_node.py", python, **task)
                await member.hear("ready", START_S)
                if name == SOURCE:
                    made.source = member
                else:
                    made.members[name] = member
            processors = Processors()
            started = time.time()
            for member in (made.source, *made.members.values()):
                member.tell(go=True)
            seconds = [words["seconds"] for words in (await made.finished(started)).values()]
            cost = {"processors_idle": processors.idle, **await network_cost(lab, SOURCE, setting.num_bytes)}
    return {"seconds": max(seconds), "first_s": min(seconds), **cost}
