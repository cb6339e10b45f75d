"""A snapshot from one node to many over slow links: Shoal, a star, a tree of whole files, BitTorrent; one packet lab.

Every node is a process in a network namespace of its own, its access link shaped by the lab (docs/lab.md). A time
runs from the moment when all are told that a version is there until the last one has verified its tensors (BitTorrent:
until its client says that the file is whole). `fluid` is the bound that no plan can beat (docs/broadcast.md).

    shoal bench broadcast --json                  # everything; needs root and /dev/net/tun
    shoal bench broadcast -- --mib 8 --only even  # a smaller file, some of the parts

Parts: `even` (8 nodes, 40 Mb/s each way, 40 ms), `uneven` (16 nodes, uplinks 5 to 100 Mb/s), `growth` (4 to 32 nodes),
`faults` (a relay killed or stopped at each quarter; three of sixteen killed), `liar` (a relay that turns bits over).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.lab.network import Network, Node
from shoal.lab.packet import PacketLab, own_environment, packet_lab
from shoal.planning.spreading import fluid_s, star_s

from _common import benchmark, emit, peer_env

SOURCE = "source"
START_S = 120.0
"""Interpreters start one after the other on few cores."""

PARTS = ("even", "uneven", "growth", "faults", "liar")
LIBTORRENT = "libtorrent==2.1.1"


@dataclass(frozen=True)
class Setting:
    """A network and a file."""

    name: str
    num_bytes: int
    source_mbps: float
    up_mbps: tuple[float, ...]
    down_mbps: float
    delay_ms: float

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


def even(num_bytes: int, count: int = 8, mbps: float = 40.0) -> Setting:
    """As many nodes alike."""
    return Setting("even", num_bytes, mbps, (mbps,) * count, mbps, 40.0)


def uneven(num_bytes: int) -> Setting:
    """16 uplinks from 5 to 100 Mb/s, evenly spaced; the source sends, and all take, 100 Mb/s."""
    return Setting("uneven", num_bytes, 100.0, tuple(5.0 + i * 95.0 / 15 for i in range(16)), 100.0, 40.0)


class Member:
    """A node's process and what it said."""

    def __init__(self, name: str, process: Process) -> None:
        self.name, self.process = name, process
        self.quarter = 0

    async def hear(self, key: str, timeout_s: float) -> dict[str, Any]:
        """Its next line that has `key`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            while line := await self.process.stdout.readline():
                said: dict[str, Any] = json.loads(line)
                self.quarter = max(self.quarter, said.get("quarter", 0))
                if key in said:
                    return said
        raise RuntimeError(f"{self.name} ended")

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")


class Swarm:
    """A lab with a source that has a version and nodes that are ready for it."""

    def __init__(self, setting: Setting, lab: PacketLab) -> None:
        self.setting, self.lab = setting, lab
        self.source: Member
        self.members: dict[str, Member] = {}
        self.links: dict[str, list[Any]] = {}
        self.hash = ""

    async def spawn(self, name: str, script: str, python: str = sys.executable, **task: Any) -> Member:
        """A process at a node."""
        here = Path(__file__).with_name(script)
        task = {"host": self.lab.address(name), "num_bytes": self.setting.num_bytes, **task}
        argv = [python, here, json.dumps(task)]
        environment = {**own_environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = await self.lab.run(name, argv, env=environment, stdin=PIPE, stdout=PIPE)
        return Member(name, process)

    def timeout_s(self) -> float:
        return 60.0 + 4 * self.setting.star_s

    async def finished(self, started: float, *, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
        """What each node said when it was whole, with its seconds."""
        members = [member for name, member in self.members.items() if name not in without]
        said = await asyncio.gather(*(member.hear("whole_at", self.timeout_s()) for member in members))
        found = {}
        for member, words in zip(members, said, strict=True):
            if self.hash and words["hash"] != self.hash:
                raise RuntimeError(f"{member.name} loaded something else")
            found[member.name] = {**words, "seconds": words["whole_at"] - started}
        return found


@asynccontextmanager
async def swarm(setting: Setting, *, relays: bool = True, lies: str = "") -> AsyncIterator[Swarm]:
    """Everybody there, and introduced."""
    async with packet_lab(setting.network) as lab:
        made = Swarm(setting, lab)
        rates = {"up_mbps": setting.source_mbps, "down_mbps": setting.source_mbps}
        made.source = await made.spawn(SOURCE, "_broadcast_node.py", role="source", **rates)
        said = await made.source.hear("ticket", START_S)
        made.hash = said["hash"]
        for name, up in zip(setting.names, setting.up_mbps, strict=True):
            made.members[name] = await made.spawn(
                name,
                "_broadcast_node.py",
                role="worker",
                ticket=said["ticket"],
                up_mbps=up,
                down_mbps=setting.down_mbps,
                relays=relays,
                lies=name == lies,
            )
        for name, member in made.members.items():
            ready = await member.hear("ready", START_S)
            made.links[name] = [*ready["link"], ready["key"]]
        yield made


async def ours(
    setting: Setting, *, relays: bool = True, fault: Callable[[Swarm], Any] | None = None, victims: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One version to all of them; `fault` happens meanwhile, and `victims` need not finish."""
    async with swarm(setting, relays=relays) as made:
        started = time.time()
        for member in made.members.values():
            member.tell(go=True)
        trouble = asyncio.create_task(fault(made)) if fault is not None else None
        found = await made.finished(started, without=victims)
        if trouble is not None:
            await trouble
        made.source.tell(report=True)
        sent = await made.source.hear("sent", 30)
        late_s = (await made.lab.statistics()).late_max_s
    seconds = [words["seconds"] for words in found.values()]
    return {
        "seconds": max(seconds),
        "first_s": min(seconds),
        "source_sent_files": sum(sent["sent"].values()) / setting.num_bytes,
        "cpu_s": sum(words["cpu_s"] for words in found.values()),
        "lab_late_ms": 1e3 * late_s,
    }


async def file_tree(setting: Setting, fan_out: int = 2) -> dict[str, Any]:
    """Each node takes the whole file from its parent, which has it by then; SHARDCAST's way of relaying."""
    async with swarm(setting, relays=False) as made:
        names = setting.names
        whole = [asyncio.Event() for _ in names]
        started = time.time()

        async def take(place: int) -> float:
            member = made.members[names[place]]
            if place < fan_out:
                member.tell(go=True)  # from the source
            else:
                parent = place // fan_out - 1
                await whole[parent].wait()
                member.tell(parent=made.links[names[parent]])
            said = await member.hear("whole_at", made.timeout_s())
            whole[place].set()
            return float(said["whole_at"]) - started

        seconds = await asyncio.gather(*(take(place) for place in range(len(names))))
    return {"seconds": max(seconds), "first_s": min(seconds)}


async def torrent(setting: Setting) -> dict[str, Any]:
    """libtorrent; everybody is told of everybody, so no tracker delays it."""
    python = str(peer_env("libtorrent", [LIBTORRENT]))
    with tempfile.TemporaryDirectory(prefix="shoal-torrent-") as scratch:
        async with packet_lab(setting.network) as lab:
            made = Swarm(setting, lab)
            file = str(Path(scratch) / "w.torrent")
            addresses = {name: lab.public_address(name) for name in (SOURCE, *setting.names)}
            for name in addresses:
                others = [address for other, address in addresses.items() if other != name]
                member = await made.spawn(
                    name,
                    "_torrent_node.py",
                    python,
                    role="source" if name == SOURCE else "worker",
                    torrent=file,
                    others=others,
                )
                await member.hear("ready", START_S)
                if name == SOURCE:
                    made.source = member
                else:
                    made.members[name] = member
            started = time.time()
            for member in (made.source, *made.members.values()):
                member.tell(go=True)
            seconds = [words["seconds"] for words in (await made.finished(started)).values()]
    return {"seconds": max(seconds), "first_s": min(seconds)}


def at_quarter(quarter: int, number: int, *victims: str) -> Callable[[Swarm], Any]:
    """Signal the victims when the first of them has that many quarters of the file; 0: at once."""

    async def happen(made: Swarm) -> None:
        member = made.members[victims[0]]
        if quarter:
            while member.quarter < quarter:
                await member.hear("quarter", made.timeout_s())
        for name in victims:
            os.kill(made.members[name].process.pid, number)

    return happen


def note(row: dict[str, Any]) -> dict[str, Any]:
    """Tell how far it is, on standard error."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


async def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The parts asked for."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    size = options.mib * 2**20

    async def add(setting: Setting, system: str, measured: Any, **more: Any) -> float:
        got = await measured
        row = {"part": setting.name, "nodes": len(setting.up_mbps), "system": system, **more, **got}
        row |= {"fluid_s": setting.fluid_s, "over_fluid": got["seconds"] / setting.fluid_s}
        rows.append(note(row))
        return float(got["seconds"])

    if "even" in options.only:
        setting = even(size, mbps=options.mbps)
        mine = await add(setting, "shoal", ours(setting))
        headline["ours_over_fluid"] = mine / setting.fluid_s
        if not options.alone:
            headline["libtorrent_over_ours"] = await add(setting, "libtorrent", torrent(setting)) / mine
            headline["file_tree_over_ours"] = await add(setting, "file tree", file_tree(setting)) / mine
            headline["star_over_ours"] = await add(setting, "star", ours(setting, relays=False)) / mine
    if "uneven" in options.only:
        setting = uneven(size)
        headline["hetero_over_fluid"] = await add(setting, "shoal", ours(setting)) / setting.fluid_s
        if not options.alone:
            await add(setting, "libtorrent", torrent(setting))
    if "growth" in options.only:
        took = {}
        for count in (4, 8, 16, 32):
            setting = even(size // 4, count, options.growth_mbps)
            took[count] = await add(setting, "shoal", ours(setting), mbps=options.growth_mbps)
        headline["growth_4_to_32"] = took[32] / took[4]
    if "faults" in options.only:
        setting = even(size // 2)
        undisturbed = await add(setting, "shoal", ours(setting), fault="none")
        worst = 0.0
        for what, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
            for quarter in (0, 1, 2, 3):
                fault = at_quarter(quarter, number, "n03")
                measured = ours(setting, fault=fault, victims=("n03",))
                took_s = await add(setting, "shoal", measured, fault=f"{what} at {quarter}/4")
                worst = max(worst, took_s / undisturbed)
        headline["worst_after_kill"] = worst
        setting = even(size // 4, 16, options.growth_mbps)
        dead = ("n02", "n07", "n11")
        calm = await add(setting, "shoal", ours(setting), fault="none")
        measured = ours(setting, fault=at_quarter(2, signal.SIGKILL, *dead), victims=dead)
        hit = await add(setting, "shoal", measured, fault="3 killed")
        headline["three_of_sixteen_killed"] = hit / calm
    if "liar" in options.only:
        setting = even(size // 4)
        async with swarm(setting, lies="n02") as made:
            started = time.time()
            for member in made.members.values():
                member.tell(go=True)
            found = await made.finished(started)  # raises where other bytes were loaded
        named = sum(bool(words["blame"]) for name, words in found.items() if name != "n02")
        seconds = max(words["seconds"] for words in found.values())
        rows.append(note({"part": "liar", "nodes": 8, "system": "shoal", "seconds": seconds, "named_by": named}))
        headline |= {"bad_loaded": 0.0, "liar_named_by": float(named)}
    return rows, headline


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="size of the file")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--mbps", type=float, default=40.0, help="link rate of the even network")
    parser.add_argument("--growth-mbps", type=float, default=10.0, help="link rate of the runs with many nodes")
    emit(*asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    benchmark(main)
