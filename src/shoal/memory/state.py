"""What a set of events amounts to: the memories there are, and how each stands.

A memory is a cluster of entries: one, or several that `Merged` events connect. Its state is a fold, in the events'
order, over those that touch its entries and are not void. An event is void if an undo that is not void itself and
comes after it names it; what touches an entry of a user is void before that user's erasure (merges excepted: they
carry no content, and who was merged with whom must not depend on what is still known).

Invariants: `fold` depends on the set of events alone (not on their order of arrival, and repeats change nothing): so
stores that hold one set agree; a merge moves no number twice, because each event is folded once into one cluster; the
representative of a cluster is its oldest entry, whoever merged and in whichever direction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from shoal.memory.events import Added, Decided, Erased, Event, Faded, Merged, Removed, Undone, Used, Vouched
from shoal.memory.evolution import Standing, aged, evolve
from shoal.memory.records import Entry
from shoal.protocol.codec import Record

Status = Literal["candidate", "active", "demoted", "rejected", "removed"]


class Memory(Record, frozen=True, kw_only=True):
    """One memory as it stands."""

    entry: Entry
    """The representative: the oldest of `members`."""
    members: tuple[str, ...]
    """Ids of its entries, sorted; more than one once it was merged."""
    status: Status = "candidate"
    weight: float = 0.0
    utility: float = 0.0
    """Mean utility of the latest uses."""
    uses: int = 0
    loss: float = 0.0
    gain: float = 0.0
    """Log evidence that it harms, that it helps (`evolution`)."""
    admission: str = ""
    """Id of the decision by which it is, or last was, active."""
    vouched: tuple[str, ...] = ()
    """Nodes that admitted it by this decision or have replayed it since, sorted."""
    created_us: int
    last_used_us: int = 0
    last: tuple[int, str, str]
    """Order of the last event that was folded."""

    @property
    def id(self) -> str:
        return self.entry.id

    def expired(self, now_us: int) -> bool:
        """Whether its time to live is over."""
        return self.entry.ttl_s > 0 and now_us >= self.created_us + self.entry.ttl_s * 1e6

    def weight_at(self, now_us: int) -> float:
        """w with its decay by age; 0 for what may not be retrieved."""
        if self.status != "active" or self.expired(now_us):
            return 0.0
        return aged(self.weight, (now_us - max(self.created_us, self.last_used_us)) / 1e6)


def step(memory: Memory | None, event: Event) -> Memory | None:
    """The memory after one more event that touches it; what does not apply changes nothing."""
    body = event.body
    if isinstance(body, Added):
        if memory is None:
            return Memory(
                entry=body.entry, members=(body.entry.id,), created_us=event.at_us, last=event.order
            )  # fmt: skip
        members = tuple(sorted({*memory.members, body.entry.id}))
        return replace(memory, members=members, last=event.order)
    if memory is None:
        return None
    memory = replace(memory, last=event.order)
    if not isinstance(body, Decided | Vouched | Used | Faded | Removed) or body.entry not in memory.members:
        return memory
    if isinstance(body, Vouched):
        known = body.admission == memory.admission
        return replace(memory, vouched=tuple(sorted({*memory.vouched, event.node}))) if known else memory
    if isinstance(body, Used):
        return _used(memory, body, event.at_us)
    if isinstance(body, Faded):
        return replace(memory, weight=memory.weight * body.factor)
    if isinstance(body, Removed):
        return replace(memory, status="removed", weight=0.0) if body.entry == memory.id else memory
    if body.accepted:
        # A fresh admission starts a fresh record of losses: replay has just shown that it helps.
        made = replace(memory, status="active", weight=body.weight, loss=0.0, gain=0.0)
        return replace(made, admission=event.id, vouched=(event.node,))
    return replace(memory, status="rejected", weight=0.0) if memory.status == "candidate" else memory


def _used(memory: Memory, body: Used, at_us: int) -> Memory:
    before = Standing(memory.weight, memory.utility, memory.uses, memory.loss, memory.gain)
    now, fate = evolve(before, body.utility, body.share)
    status = memory.status
    if status in ("active", "demoted") and fate != "stays":
        status = fate
    held = 0.0 if status in ("candidate", "rejected", "removed") else now.weight
    return replace(
        memory,
        status=status,
        weight=held,
        utility=now.utility,
        uses=now.uses,
        loss=now.loss,
        gain=now.gain,
        last_used_us=max(memory.last_used_us, at_us),
    )


def void_events(events: Iterable[Event]) -> set[str]:
    """Ids of events that an undo in force has taken back."""
    known = {event.id: event for event in events}
    void: set[str] = set()
    # An undo counts only for what came before it: latest first, each undo's own standing is settled when it is met.
    for event in sorted(known.values(), key=lambda e: e.order, reverse=True):
        if isinstance(event.body, Undone) and event.id not in void:
            for target in event.body.targets:
                found = known.get(target)
                if found is not None and found.order < event.order and not isinstance(found.body, Erased):
                    void.add(target)
    return void


def fold(events: Iterable[Event]) -> dict[str, Memory]:
    """The memories that a set of events amounts to, by the id of their representative. The reference for the store."""
    known = {event.id: event for event in events}
    void = void_events(known.values())
    erasures: dict[str, tuple[int, str, str]] = {}
    owner: dict[str, str] = {}
    parent: dict[str, str] = {}

    def root(entry: str) -> str:
        while parent.setdefault(entry, entry) != entry:
            parent[entry] = parent[parent[entry]]
            entry = parent[entry]
        return entry

    for event in known.values():
        body = event.body
        if isinstance(body, Erased):
            erasures[body.user] = max(erasures.get(body.user, event.order), event.order)
        elif isinstance(body, Added):
            owner[body.entry.id] = body.entry.scope.user
        elif isinstance(body, Merged) and event.id not in void:
            parent[root(body.first)] = root(body.second)
    clusters: dict[str, list[Event]] = defaultdict(list)
    for event in known.values():
        if event.id in void or isinstance(event.body, Merged):
            continue
        for entry in event.body.entries:
            user = owner.get(entry, "")
            if not (user and user in erasures and event.order < erasures[user]):
                clusters[root(entry)].append(event)
    memories = (fold_cluster(touching) for touching in clusters.values())
    return {memory.id: memory for memory in memories if memory is not None}


def fold_cluster(events: Iterable[Event]) -> Memory | None:
    """One memory from the events in force that touch its entries."""
    memory: Memory | None = None
    for event in sorted(events, key=lambda e: e.order):
        memory = step(memory, event)
    return memory
