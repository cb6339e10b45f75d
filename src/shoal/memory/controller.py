"""What to merge, what to prune, what to admit at whose cost: pure choices over memories as they stand.

Invariants: a pass prunes at most `MAX_PRUNE_SHARE` of the active memories (a runaway consolidation elsewhere destroyed
four of five entries in two days) or one, whichever is more; what is chosen is a list of events to record, so all of
it can be undone; only memories of one family and one scope are merged; the choice depends on the memories alone, not
on their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.memory.events import Faded, Merged, Removed
from shoal.memory.screening import words
from shoal.memory.state import Memory

MERGE_SIMILARITY = 0.9
HARM_USES = 6
FAINT = 0.25
"""A memory with this many uses, a mean utility below 0 and less than this share of its family's largest weight is
pruned even where there is room: others are shown before it, so the losses that would demote it never come."""

FADE_USES = 100
FADE = 0.8
"""While its family is used this often, a memory that is not used, and that use has not confirmed yet, keeps this share
of its weight: what is never shown can neither prove itself nor be found out, and may not hold its weight for that."""

MAX_PRUNE_SHARE = 0.1
TRANSFER = 0.5
"""gamma: what an abstract form keeps of its origin's weight in the origin's family."""

_NEGATIONS = frozenset(
    ("not", "no", "never", "none", "without", "cannot", "don", "avoid", "unless", "except", "isn", "doesn", "nor")
)


@dataclass(frozen=True)
class Budget:
    """What the active memories may take."""

    entries: int = 10_000
    bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.entries < 1 or self.bytes < 1:
            raise ConfigError("a memory budget must leave room for at least one entry and one byte.")


def text_bytes(memory: Memory) -> int:
    """What a memory costs of the budget's bytes."""
    return len(memory.entry.text.encode(errors="replace"))


def harms(memory: Memory, largest: float) -> bool:
    """Whether use has spoken against a memory, and it is faint beside the `largest` weight of its family."""
    return memory.uses >= HARM_USES and memory.utility < 0 and memory.weight <= FAINT * largest


def worst_first(memories: Iterable[Memory], now_us: int) -> list[Memory]:
    """Active memories, those to give up first in front: expired, then by decayed weight, then by id."""
    active = [memory for memory in memories if memory.status == "active"]
    return sorted(active, key=lambda m: (not m.expired(now_us), m.weight_at(now_us), m.id))


def prune(memories: Sequence[Memory], budget: Budget, now_us: int) -> list[Removed]:
    """One pass: what is expired or harms, then the worst until the rest fits the budget, up to what a pass may."""
    ranked = worst_first(memories, now_us)
    allowed = max(1, math.floor(MAX_PRUNE_SHARE * len(ranked)))
    count, size = len(ranked), sum(map(text_bytes, ranked))
    largest: dict[str, float] = {}
    for memory in ranked:
        largest[memory.entry.family] = max(largest.get(memory.entry.family, 0.0), memory.weight)
    faint = {memory.id for memory in ranked if harms(memory, largest[memory.entry.family])}
    # What must go by itself first; the sort keeps the order within.
    ranked.sort(key=lambda m: not (m.expired(now_us) or m.id in faint))
    chosen: list[Removed] = []
    for memory in ranked:
        expired, harmful = memory.expired(now_us), memory.id in faint
        if len(chosen) == allowed or not (expired or harmful or count > budget.entries or size > budget.bytes):
            break
        chosen.append(Removed(entry=memory.id, reason="expired" if expired else "harmful" if harmful else "pruned"))
        count, size = count - 1, size - text_bytes(memory)
    return chosen


def fade(memories: Sequence[Memory], used: Mapping[str, int]) -> list[Faded]:
    """Which memories lose weight for having been passed over.

    Args:
        used: uses by memory id since this was last asked.
    """
    active = [memory for memory in memories if memory.status == "active"]
    family_uses: dict[str, int] = {}
    for memory in active:
        family_uses[memory.entry.family] = family_uses.get(memory.entry.family, 0) + used.get(memory.id, 0)
    return [
        Faded(entry=memory.id, factor=FADE)
        for memory in active
        if family_uses[memory.entry.family] >= FADE_USES
        and not used.get(memory.id)
        and not (memory.uses >= HARM_USES and memory.utility > 0)
    ]


def make_room(
    memories: Sequence[Memory], newcomer: Memory, weight: float, budget: Budget, now_us: int
) -> list[Removed] | None:
    """What must go so that `newcomer` fits at `weight`; None where that would cost better ones, or too many."""
    ranked = [memory for memory in worst_first(memories, now_us) if memory.id != newcomer.id]
    allowed = max(1, math.floor(MAX_PRUNE_SHARE * len(ranked)))
    count, size = len(ranked) + 1, sum(map(text_bytes, ranked)) + text_bytes(newcomer)
    chosen: list[Removed] = []
    for memory in ranked:
        if count <= budget.entries and size <= budget.bytes:
            break
        if len(chosen) == allowed or memory.weight_at(now_us) >= weight:
            return None
        chosen.append(Removed(entry=memory.id, reason="pruned"))
        count, size = count - 1, size - text_bytes(memory)
    return chosen if count <= budget.entries and size <= budget.bytes else None


def conflict(first: str, second: str) -> bool:
    """Whether two like texts may say opposite things: one negates, or they name different numbers.

    A careful guess: texts that conflict by this rule stay two entries.
    """
    a, b = words(first), words(second)
    negated = bool(_NEGATIONS & set(a)) != bool(_NEGATIONS & set(b))
    return negated or {w for w in a if w.isdigit()} != {w for w in b if w.isdigit()}


def may_merge(first: Memory, second: Memory, similarity: float) -> bool:
    """Whether two active memories are one thing said twice."""
    alike = (first.entry.family, first.entry.scope) == (second.entry.family, second.entry.scope)
    active = first.status == second.status == "active" and first.id != second.id
    return active and alike and similarity >= MERGE_SIMILARITY and not conflict(first.entry.text, second.entry.text)


def merge(first: Memory, second: Memory) -> Merged:
    """The event that makes two memories one, the same whoever is named first."""
    low, high = sorted((first.id, second.id))
    return Merged(first=low, second=high)
