"""A snapshot from one node to many over slow links: Shoal, a star, a tree of whole files, BitTorrent; one packet lab.

Every node is a process in a network namespace of its own, its access link shaped by the lab (docs/lab.md). A time
runs from the moment when all are told that a version is there until the last one has verified its tensors (BitTorrent:
until its client says that the file is whole). `fluid` is the bound that no plan can beat (docs/broadcast.md).

    shoal bench broadcast --json                  # everything; needs root and /dev/net/tun
    shoal bench broadcast -- --only even --alone  # some of the parts, without the peers

All nodes and the lab's switch share this machine's processors, which a real swarm does not: at 40 Mb/s eight nodes
keep two cores busy all the time, and the processor would be measured. So links are slower here by `--slower` (4: 10
instead of 40 Mb/s) for all systems alike, and delays are not; `processors_idle` says how idle the machine was. With
more nodes, links are slower by another factor, which a row's `mbps` shows.

Parts: `even` (8 nodes, 40 Mb/s each way, 40 ms), `uneven` (16 nodes, uplinks 5 to 100 Mb/s, told and measured),
`growth` (4 to 32 nodes), `faults` (a relay killed or stopped at each quarter; three of sixteen killed), `liar` (a relay
that serves corrupted, reordered, old or foreign chunks), `joiner` (one that comes later, and one that holds a quarter
of the tensors), `training` (the learner's utilisation in a run over slow links, with a star and with relays).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable
from typing import Any

from _broadcast_training import training
from _spreading import Fault, Row, Setting, Swarm, file_tree, ours, spread, swarm, torrent

from _common import benchmark, emit

PARTS = ("even", "uneven", "growth", "faults", "liar", "joiner", "training")
LIES = ("corrupted", "reordered", "old", "foreign")

EVEN_MBPS = 40.0
UNEVEN_SLOWER = 4.0
"""Sixteen nodes with uplinks of 940 Mb/s in all: slower once more."""

GROWTH_SLOWER = 8.0
"""Thirty-two nodes, likewise."""


def even(num_bytes: int, slower: float, count: int = 8) -> Setting:
    """As many nodes alike."""
    rate = EVEN_MBPS / slower
    return Setting("even", num_bytes, rate, (rate,) * count, rate)


def uneven(num_bytes: int, slower: float) -> Setting:
    """16 uplinks from 5 to 100 Mb/s, evenly spaced; the source sends, and all take, 100 Mb/s."""
    ups = tuple((5.0 + i * 95.0 / 15) / slower for i in range(16))
    return Setting("uneven", num_bytes, 100.0 / slower, ups, 100.0 / slower)


def at_quarter(quarter: int, number: int, *victims: str) -> Fault:
    """Signal the victims when the first of them has that many quarters of the file; 0: at once."""

    async def happen(made: Swarm) -> None:
        member = made.members[victims[0]]
        while member.quarter < quarter:
            await member.hear("quarter", made.timeout_s())
        for name in victims:
            os.kill(made.members[name].process.pid, number)

    return happen


class Bench:
    """Runs parts and keeps what they came to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.slower: float = options.slower
        self.alone: bool = options.alone
        self.size: int = options.mib * 2**20
        self.rows: list[Row] = []
        self.headline: dict[str, float] = {}

    async def add(self, setting: Setting, system: str, measured: Awaitable[Row], **more: Any) -> float:
        """A row of one system in one network; gives its seconds."""
        got = await measured
        row = {"part": setting.name, "nodes": len(setting.up_mbps), "mbps": setting.source_mbps, "system": system}
        row |= {**more, "fluid_s": setting.fluid_s, "over_fluid": got["seconds"] / setting.fluid_s, **got}
        self.note(row)
        return float(got["seconds"])

    def note(self, row: Row) -> None:
        """Keep a row, and tell how far it is on standard error."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    async def even(self) -> None:
        setting = even(self.size, self.slower)
        mine = await self.add(setting, "shoal", ours(setting))
        self.headline["ours_over_fluid"] = mine / setting.fluid_s
        if self.alone:
            return
        self.headline["libtorrent_over_ours"] = await self.add(setting, "libtorrent", torrent(setting)) / mine
        self.headline["file_tree_over_ours"] = await self.add(setting, "file tree", file_tree(setting)) / mine
        self.headline["star_over_ours"] = await self.add(setting, "star", ours(setting, relays=False)) / mine

    async def uneven(self) -> None:
        setting = uneven(self.size // 2, UNEVEN_SLOWER * self.slower)
        seconds = await self.add(setting, "shoal", ours(setting), rates="told")
        self.headline["hetero_over_fluid"] = seconds / setting.fluid_s
        async with swarm(setting, tells_rates=False) as made:
            for version in (1, 2, 3):
                if version > 1:
                    await made.publish(version)
                seconds = await self.add(setting, "shoal", spread(made, version), rates=f"measured, version {version}")
        self.headline["hetero_measured_over_fluid"] = seconds / setting.fluid_s
        if not self.alone:
            await self.add(setting, "libtorrent", torrent(setting))

    async def growth(self) -> None:
        took = {}
        for count in (4, 8, 16, 32):
            setting = even(self.size // 8, GROWTH_SLOWER * self.slower, count)
            took[count] = await self.add(setting, "shoal", ours(setting))
        self.headline["growth_4_to_32"] = took[32] / took[4]

    async def faults(self) -> None:
        setting = even(self.size // 2, self.slower)
        undisturbed = await self.add(setting, "shoal", ours(setting), fault="none")
        worst = 0.0
        for what, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
            for quarter in (0, 1, 2, 3):
                fault = at_quarter(quarter, number, "n03")
                measured = ours(setting, fault=fault, victims=("n03",))
                took_s = await self.add(setting, "shoal", measured, fault=f"{what} at {quarter}/4")
                worst = max(worst, took_s / undisturbed)
        self.headline["worst_after_kill"] = worst
        setting = even(self.size // 16, GROWTH_SLOWER / 2 * self.slower, 16)
        dead = ("n02", "n07", "n11")
        calm = await self.add(setting, "shoal", ours(setting), fault="none")
        measured = ours(setting, fault=at_quarter(2, signal.SIGKILL, *dead), victims=dead)
        hit = await self.add(setting, "shoal", measured, fault="3 killed")
        self.headline["three_of_sixteen_killed"] = hit / calm

    async def liar(self) -> None:
        setting = even(self.size // 8, self.slower)
        others = len(setting.names) - 1
        fewest = others
        for lie in LIES:
            async with swarm(setting) as made:
                liar, version = made.links["n02"][2], 1
                if lie == "old":
                    await made.finished(made.go(version))
                    version += 1
                    await made.publish(version)
                made.members["n02"].tell(lie=lie)
                found = await made.finished(made.go(version))  # raises where other bytes were loaded
            honest = [words for name, words in found.items() if name != "n02"]
            named = sum(liar_id(liar) in words["blame"] for words in honest)
            taken = sum(words["received"].get(liar_id(liar), 0) for words in honest)
            seconds = max(words["seconds"] for words in found.values())
            row = {"part": "liar", "lie": lie, "nodes": len(found), "system": "shoal", "seconds": seconds}
            self.note({**row, "over_fluid": seconds / setting.fluid_s, "named_by": named, "bytes_taken_from_it": taken})
            fewest = min(fewest, named)
        self.headline |= {"bad_loaded": 0.0, "liar_named_by_share": fewest / others}

    async def joiner(self) -> None:
        """After three versions, whose changes are small: a node that holds nothing, and one that wants a quarter."""
        setting = even(self.size // 8, self.slower)
        late, part = setting.names[-2:]
        async with swarm(setting, parts={part: 1}) as made:
            for version in (1, 2, 3):
                if version > 1:
                    await made.publish(version, nudge=True)
                await made.finished(made.go(version, without=(late, part)), without=(late, part))
            for name, what in ((late, "late"), (part, "quarter")):
                others = tuple(other for other in made.members if other != name)
                words = (await made.finished(made.go(3, without=others), without=others))[name]
                taken = sum(words["received"].values()) / setting.num_bytes
                from_learner = words["received"].get(learner_id(), 0) / setting.num_bytes
                row = {"part": "joiner", "node": what, "system": "shoal", "seconds": words["seconds"]}
                self.note({**row, "taken_files": taken, "of_it_from_the_source": from_learner})
                self.headline |= {f"{what}_taken_files": taken, f"{what}_from_source_files": from_learner}
                self.headline[f"{what}_over_link"] = words["seconds"] / (setting.num_bytes / setting.down_mbps / 125e3)

    async def training(self) -> None:
        for relays in (False, True):
            name = "ours" if relays else "star"
            found = await training(relays=relays)
            self.note({"part": "training", "system": name, **found})
            self.headline[f"utilisation_{name}"] = found["utilisation"]


def liar_id(public_key: str) -> str:
    """As nodes count blame."""
    from shoal.fabric.identity import node_id_of

    return node_id_of(bytes.fromhex(public_key))


def learner_id() -> str:
    """The source's."""
    from _broadcast_node import LEARNER

    return LEARNER.node_id


async def run(options: argparse.Namespace) -> Bench:
    """The parts asked for."""
    bench = Bench(options)
    for part in PARTS:
        if part in options.only:
            await getattr(bench, part)()
    return bench


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="size of the file")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--slower", type=float, default=4.0, help="by how much links are slower than named")
    bench = asyncio.run(run(parser.parse_args()))
    emit(bench.rows, bench.headline)


if __name__ == "__main__":
    benchmark(main)
