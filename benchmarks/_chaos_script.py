"""What goes wrong, where and when: a fault script, drawn from a seed. Pure.

    draw(seed) ──▶ Script(seed, seconds, faults) ──▶ JSON, which replays

The swarm that it is written for: `home` holds coordinator and learner, `worker-0` passes snapshots on as a relay,
`worker-1` is a plain worker, all reach each other through `router-0` and `router-1` alone; `server` follows the run.

Invariants, property-tested: the same seed and kinds give the same script; faults begin in order and end before the
script does; a node is never struck by two faults at once, nor again before it had `REST_S`, so that what recovers can
be timed, while different nodes are struck at once as chance has it; every fault has a target that its kind can strike.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

import msgspec

SECONDS = 20.0
"""How long faults fall; recovery comes on top."""

FAULTS = (3, 5)
"""A script has so many, where they fit."""

REST_S = 4.0
"""A node has this long between two faults, which is less than a worker takes to come back."""

MAX_DRAWS = 200
"""Drawing ends after so many tries, with as many faults as fitted."""

NODES = ("home", "worker-0", "worker-1", "router-0", "router-1", "server")

PARTS = {
    "coordinator": "home",
    "learner": "home",
    "worker-0": "worker-0",
    "worker-1": "worker-1",
    "router-0": "router-0",
    "router-1": "router-1",
    "server": "server",
}
"""The processes, and the node of each."""

DISKS = ("home", "worker-0", "worker-1", "server")
"""Nodes that keep anything."""

EDGES = ("home", "worker-0", "worker-1", "server")
"""Nodes that dial."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that goes wrong.

    Attributes:
        kind: a key of `KINDS`.
        targets: nodes, or one process; of a one-way cut, source and target; of a partition, one side.
        at_s: after the script's begin.
        for_s: then it is undone. What is killed is started again after it.
        amount: how much, in the kind's unit.
    """

    kind: str
    targets: tuple[str, ...]
    at_s: float
    for_s: float
    amount: float = 0.0

    @property
    def end_s(self) -> float:
        return self.at_s + self.for_s

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that it strikes."""
        return frozenset(PARTS.get(target, target) for target in self.targets)


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong in one run."""

    seed: int
    seconds: float
    faults: tuple[Fault, ...]


class Kind(NamedTuple):
    """How faults of a kind are drawn."""

    targets: tuple[tuple[str, ...], ...]
    """Of which one is drawn."""
    for_s: tuple[float, float]
    amounts: tuple[float, ...] = (0.0,)
    """Of which one is drawn."""


def _each(names: Collection[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


KINDS: dict[str, Kind] = {
    "kill_worker": Kind(_each(["worker-1"]), (0.2, 2.0)),
    "kill_relay": Kind(_each(["worker-0"]), (0.2, 2.0)),
    "kill_learner": Kind(_each(["learner"]), (0.2, 0.2)),
    "kill_server": Kind(_each(["server"]), (0.2, 2.0)),
    "restart_coordinator": Kind(_each(["coordinator"]), (0.2, 2.0)),
    "restart_router": Kind(_each(["router-0", "router-1"]), (0.5, 4.0)),
    "pause": Kind(_each(PARTS), (0.5, 5.0)),
    "disk_full": Kind(_each(DISKS), (2.0, 6.0)),
    "disk_read_only": Kind(_each(DISKS), (2.0, 6.0)),
    "disk_slow": Kind(_each(DISKS), (3.0, 8.0), (50e3, 200e3)),
    "clock_jump": Kind(_each(DISKS), (2.0, 8.0), (-3600.0, -30.0, 5.0, 45.0, 3600.0)),
    "partition": Kind((("home",), ("home", "router-0"), ("worker-0", "worker-1"), ("server",)), (1.0, 6.0)),
    "one_way_cut": Kind(
        tuple(
            pair for edge in EDGES for router in ("router-0", "router-1") for pair in ((edge, router), (router, edge))
        ),
        (1.0, 6.0),
    ),
    "loss": Kind(_each(NODES), (2.0, 8.0), (0.3,)),
    "jitter": Kind(_each(NODES), (2.0, 8.0), (0.05, 0.2)),
    "duplication": Kind(_each(NODES), (2.0, 8.0), (0.3,)),
    "reordering": Kind(_each(NODES), (2.0, 8.0), (0.3,)),
    "port_exhaustion": Kind(_each(EDGES), (3.0, 6.0)),
    "descriptor_exhaustion": Kind(_each(PARTS), (2.0, 6.0)),
}
"""Amounts: `disk_slow` bytes a second; `clock_jump` and `jitter` seconds; the other weathers a share of packets."""

WEATHERS = ("loss", "jitter", "duplication", "reordering")
"""Kinds that change what happens to packets that leave a node."""


def draw(seed: int, kinds: Collection[str] = tuple(KINDS), seconds: float = SECONDS) -> Script:
    """The script of a seed, of these kinds only."""
    rng = random.Random(f"chaos {seed}")
    wanted = rng.randint(*FAULTS)
    names = sorted(kinds)
    faults: list[Fault] = []
    for _ in range(MAX_DRAWS):
        if len(faults) == wanted:
            break
        fault = _draw_fault(rng, rng.choice(names), seconds)
        if _fits(fault, faults):
            faults.append(fault)
    return Script(seed=seed, seconds=seconds, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))


def _draw_fault(rng: random.Random, name: str, seconds: float) -> Fault:
    kind = KINDS[name]
    for_s = min(rng.uniform(*kind.for_s), seconds)
    return Fault(
        kind=name,
        targets=rng.choice(kind.targets),
        at_s=round(rng.uniform(0.0, seconds - for_s), 3),
        for_s=round(for_s, 3),
        amount=rng.choice(kind.amounts),
    )


def _fits(fault: Fault, others: Collection[Fault]) -> bool:
    """Whether no node of it is struck by another, or has been just before."""
    return not any(
        fault.nodes & other.nodes and fault.at_s < other.end_s + REST_S and other.at_s < fault.end_s + REST_S
        for other in others
    )


def check(script: Script) -> str:
    """What is wrong with a script that somebody wrote; empty if nothing."""
    for fault in script.faults:
        if fault.kind not in KINDS:
            return f"there is no fault {fault.kind!r}"
        if fault.targets not in KINDS[fault.kind].targets:
            return f"{fault.kind} cannot strike {' and '.join(fault.targets)}"
        if fault.at_s < 0 or fault.for_s <= 0 or fault.end_s > script.seconds:
            return f"{fault.kind} is not within the script's {script.seconds:g} s"
    return ""
