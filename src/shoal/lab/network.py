"""The description of a network: nodes with their access links, paths between them, NATs, and scripted cuts.

A node hangs on the middle of the network by one access link. Its `up_mbps` and `down_mbps` are shared by all its
flows; rates count the bits of IP packets, headers included. Delay is one way. What a packet from a to b meets is a's
uplink (rate and queue), then the access delays of both and the path's own delay with their jitter, loss, duplication
and reordering, then b's downlink (rate and queue).

Invariant: a description that exists is valid; everything that is wrong with one is a `ConfigError`.

    seed = 7
    nodes = [
        { name = "router", up_mbps = 100, down_mbps = 100 },
        { name = "home", up_mbps = 20, down_mbps = 50, delay_ms = 15, jitter_ms = 2, loss = 0.001, nat = "cone" },
    ]
    events = [{ at_s = 30, action = "isolate", node = "router" }, { at_s = 40, action = "heal" }]
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Literal

import msgspec

from shoal.errors import ConfigError

MAX_NODES = 250
"""Each node has its own last byte in the lab's address ranges."""

MIN_MTU, MAX_MTU = 576, 9000
"""Bytes: what every IPv4 host must take, and a jumbo frame."""

MIN_TICK_MS, MAX_TICK_MS = 0.05, 5.0
"""Below it a tick costs more than it brings; above it delays are coarse."""

DEFAULT_QUEUE_S = 0.1
"""A queue whose size is not given holds this long a burst at its link's rate."""

MIN_DEFAULT_QUEUE_PACKETS = 32
"""A slow link's default queue still holds the first window of a few TCP flows."""

BYTES_PER_MEGABIT = 125_000

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
"""Node names become parts of namespace names."""

NatKind = Literal["none", "cone", "symmetric"]


class Impairment(msgspec.Struct, frozen=True):
    """What happens to a packet between two nodes; times in seconds, the others shares between 0 and 1."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine and its access link; a rate that is not given is unlimited.

    Attributes:
        delay_ms: one way, added in both directions, as are the other impairments.
        jitter_ms: each packet's delay varies evenly by up to this much either way, without overtaking.
        loss: share of packets lost in each direction.
        duplicate: share of packets that arrive twice.
        reorder: share of packets that are held back so that later ones overtake them.
        queue_bytes: what may wait before each of the two links; by default 100 ms at its rate.
        nat: the node's process sees a private address; others see the public one. `cone` keeps one public port for a
            private one, `symmetric` takes another for every destination; both let in only whom the node wrote to.
    """

    name: str
    up_mbps: float | None = None
    down_mbps: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    queue_bytes: int | None = None
    nat: NatKind = "none"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"A node cannot be called {self.name[:40]!r}.", "Use a-z, 0-9 and -, at most 31, first a letter."
            )
        for key in ("up_mbps", "down_mbps"):
            rate = getattr(self, key)
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"{key} of node {self.name} is {rate}.", "Give a rate above 0, or none for no limit.")
        if self.queue_bytes is not None and self.queue_bytes <= 0:
            raise ConfigError(f"queue_bytes of node {self.name} is {self.queue_bytes}.", "Give a size above 0.")
        _check_impairments(f"node {self.name}", self)


class Path(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the way from `source` to `target` adds to their access links; both ways unless `one_way`."""

    source: str
    target: str
    one_way: bool = False
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __post_init__(self) -> None:
        _check_impairments(f"the path from {self.source} to {self.target}", self)


class Partition(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="action", tag="partition"
):
    """Nodes of different groups no longer reach each other; nodes in no group keep reaching everybody."""

    groups: tuple[tuple[str, ...], ...]
    at_s: float = 0.0


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="action", tag="cut"):
    """`source` no longer reaches `target`, nor the other way round unless `one_way`."""

    source: str
    target: str
    one_way: bool = False
    at_s: float = 0.0


class Isolate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="action", tag="isolate"):
    """The box between `node` and the world is dead: no packet in or out; its NAT forgets its mappings."""

    node: str
    at_s: float = 0.0


class Heal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="action", tag="heal"):
    """Undo every cut."""

    at_s: float = 0.0


Event = Partition | Cut | Isolate | Heal


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole network.

    Attributes:
        events: the script, by seconds after `Lab.play`; `action` in TOML is their tag.
        seed: the same seed treats the n-th packet of a path the same way.
        mtu: bytes of the largest IP packet.
        reorder_hold_ms: how long a reordered packet is held back.
        tick_ms: how finely a busy packet lab keeps time; a longer tick costs less processor time.
    """

    nodes: tuple[Node, ...]
    paths: tuple[Path, ...] = ()
    events: tuple[Event, ...] = ()
    seed: int = 0
    mtu: int = 1500
    reorder_hold_ms: float = 5.0
    tick_ms: float = 0.5

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not 1 <= len(names) <= MAX_NODES:
            raise ConfigError(f"The network has {len(names)} nodes.", f"Give 1 to {MAX_NODES}.")
        if double := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"Two nodes are called {min(double)}.", "Give each node its own name.")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigError(f"mtu is {self.mtu}.", f"Give {MIN_MTU} to {MAX_MTU} bytes.")
        if not (math.isfinite(self.reorder_hold_ms) and self.reorder_hold_ms >= 0):
            raise ConfigError(f"reorder_hold_ms is {self.reorder_hold_ms}.", "Give a time of 0 or more.")
        if not MIN_TICK_MS <= self.tick_ms <= MAX_TICK_MS:
            raise ConfigError(f"tick_ms is {self.tick_ms}.", f"Give {MIN_TICK_MS} to {MAX_TICK_MS} ms.")
        for node in self.nodes:
            if node.queue_bytes is not None and node.queue_bytes < self.mtu:
                problem = f"queue_bytes of node {node.name} is {node.queue_bytes}, less than one packet."
                raise ConfigError(problem, f"Give at least the mtu, {self.mtu}.")
        ways = [way for path in self.paths for way in _ways(path)]
        if double_ways := {way for way in ways if ways.count(way) > 1}:
            source, target = min(double_ways)
            raise ConfigError(f"The path from {source} to {target} is described twice.", "Keep one description.")
        for path in self.paths:
            self._check_names("A path", (path.source, path.target))
            if path.source == path.target:
                raise ConfigError(f"A path leads from {path.source} to itself.", "Name two nodes.")
        for event in self.events:
            self.check_event(event)

    def index(self, name: str) -> int:
        """The node's place in `nodes`.

        Raises:
            ConfigError: there is no such node.
        """
        for place, node in enumerate(self.nodes):
            if node.name == name:
                return place
        raise ConfigError(f"The network has no node {name!r}.", f"It has {', '.join(n.name for n in self.nodes)}.")

    def impairment(self, source: str, target: str) -> Impairment:
        """What a packet from `source` to `target` meets, access links and path together."""
        parts: list[Node | Path] = [self.nodes[self.index(source)], self.nodes[self.index(target)]]
        parts += [path for path in self.paths if (source, target) in _ways(path)]
        return Impairment(
            delay_s=sum(part.delay_ms for part in parts) / 1e3,
            jitter_s=sum(part.jitter_ms for part in parts) / 1e3,
            loss=_either(part.loss for part in parts),
            duplicate=_either(part.duplicate for part in parts),
            reorder=_either(part.reorder for part in parts),
        )

    def queue_bytes(self, node: Node, rate_mbps: float | None) -> int:
        """Size of the queue before one of the node's links."""
        if node.queue_bytes is not None:
            return node.queue_bytes
        smallest = MIN_DEFAULT_QUEUE_PACKETS * self.mtu
        return smallest if rate_mbps is None else max(smallest, round(rate_mbps * BYTES_PER_MEGABIT * DEFAULT_QUEUE_S))

    def public_address(self, name: str) -> str:
        """The address under which others reach the node."""
        return f"10.77.0.{self.index(name) + 1}"

    def address(self, name: str) -> str:
        """The address that the node's own processes see and bind: a private one behind a NAT."""
        place = self.index(name)
        return self.public_address(name) if self.nodes[place].nat == "none" else f"192.168.{place + 1}.2"

    def check_event(self, event: Event) -> None:
        """Refuse an event that names nodes which do not exist, or a time before the start."""
        if not (math.isfinite(event.at_s) and event.at_s >= 0):
            raise ConfigError(f"An event is at {event.at_s} s.", "Give a time of 0 or more.")
        match event:
            case Partition(groups=groups):
                members = [name for group in groups for name in group]
                if len(members) != len(set(members)):
                    raise ConfigError("A node is in two groups of one partition.", "Put each in one group.")
            case Cut(source=source, target=target):
                members = [source, target]
            case Isolate(node=node):
                members = [node]
            case Heal():
                members = []
        self._check_names("An event", members)

    def _check_names(self, what: str, names: Sequence[str]) -> None:
        known = {node.name for node in self.nodes}
        for name in names:
            if name not in known:
                raise ConfigError(f"{what} names {name!r}, which is no node.", f"Nodes are {', '.join(sorted(known))}.")


def load_network(file: FilePath) -> Network:
    """Read a description.

    Raises:
        ConfigError: no such file, no TOML, or no valid description; the message names the key.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.", "Give the TOML file of a network.") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of thousands of digits, and deep nesting, are no TOML either
        raise ConfigError(f"{file} is not TOML: {error}.", "Mend the file.") from None
    try:
        return msgspec.convert(table, Network)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file} is no network: {error}.", "docs/lab.md lists the keys.") from None


def _ways(path: Path) -> list[tuple[str, str]]:
    there = (path.source, path.target)
    return [there] if path.one_way else [there, (path.target, path.source)]


def _check_impairments(what: str, part: Node | Path) -> None:
    for key in ("delay_ms", "jitter_ms"):
        value = getattr(part, key)
        if not (math.isfinite(value) and 0 <= value <= 60_000):
            raise ConfigError(f"{key} of {what} is {value}.", "Give milliseconds from 0 to 60000.")
    if part.jitter_ms > part.delay_ms:
        raise ConfigError(f"jitter_ms of {what} is above its delay_ms.", "No packet arrives before it was sent.")
    for key in ("loss", "duplicate", "reorder"):
        value = getattr(part, key)
        if not 0 <= value <= 1:
            raise ConfigError(f"{key} of {what} is {value}.", "Give a share from 0 to 1.")


def _either(shares: Iterable[float]) -> float:
    """The share of packets that at least one of several independent causes meets."""
    missed = 1.0
    for share in shares:
        missed *= 1.0 - share
    return 1.0 - missed
