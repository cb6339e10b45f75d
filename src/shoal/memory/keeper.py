"""One node's memories in use: the shell that ties the store to index, embedder, admission and controller.

Everything that is decided here is decided by pure functions elsewhere; this module fetches what they need, records what
they choose, and keeps the index level with the store. It drives no model: whoever runs replays calls `report`.

Invariants: the active memories never exceed the budget, not even between two calls (room is made in the transaction
that admits; a merge with another node's events is followed by pruning before anything is retrieved); only what is
active, in scope and not expired is retrieved; recalled text is never written down again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from shoal.errors import ConfigError, RecordError
from shoal.memory.abstraction import abstract
from shoal.memory.admission import AdmissionPolicy, Decision, decide, discovery_level, evidence, gain
from shoal.memory.audit import audit, false_claims
from shoal.memory.controller import TRANSFER, Budget, fade, make_room, may_merge, merge, prune
from shoal.memory.embedding import DIMENSIONS, Embedder, HashedEmbedder
from shoal.memory.events import (
    MAX_TARGETS,
    Added,
    AnyBody,
    Decided,
    Erased,
    Event,
    Noted,
    Removed,
    Tried,
    Undone,
    Used,
)
from shoal.memory.evolution import HALF_LIFE_S
from shoal.memory.extract import same_words, screen
from shoal.memory.index import VectorIndex
from shoal.memory.recall import CountTokens, Recall, compose
from shoal.memory.records import Context, Entry, Scope, Trial
from shoal.memory.state import Memory
from shoal.memory.store import Store

RECENT_USES = 256
"""f_use is an entry's share of this many latest uses."""

REFERENCE_US = 1_767_225_600 * 10**6
"""Weights in the index are as of this time (2026): with one half-life for all, ageing changes no order."""

NEIGHBOURS = 8
"""Nearest memories that a new one is compared with."""

SCOPED_EXTRA = 4
"""A search that is held to a scope or family scores this many times the vectors."""


@dataclass(frozen=True)
class Found:
    """One answer of a search."""

    memory: Memory
    similarity: float
    weight: float

    @property
    def score(self) -> float:
        """s(q, m) = sim(q, m) * w(m)."""
        return self.similarity * self.weight


class Keeper:
    """Memories in one folder: `memory.db` and, beside it, a saved index. Close it, or use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        node: str,
        *,
        embedder: Embedder | None = None,
        policy: AdmissionPolicy | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.embedder = embedder or HashedEmbedder(DIMENSIONS)
        self.policy, self.budget = policy or AdmissionPolicy(), budget or Budget()
        self.store = Store(folder / "memory.db", node)
        self.store.use_vectors_of(self.embedder.name)
        self._index_folder = folder / f"index-{self.embedder.name}"
        loaded = VectorIndex.load(self._index_folder, self.embedder.dimensions)
        ahead = loaded is not None and loaded.position > self.store.position
        self.index = VectorIndex(self.embedder.dimensions) if loaded is None or ahead else loaded
        self._recent: deque[str] = deque(maxlen=RECENT_USES)
        self._shares: Counter[str] = Counter()
        self._used_since: Counter[str] = Counter()
        """Uses by memory since the last upkeep that found enough of them to judge by."""
        self._follow()

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- candidates and their trials

    def note(self, context: Context) -> str:
        """Keep a context; gives its hash."""
        if self.store.context(context.id) is None:
            self._record(Noted(context=context))
        return context.id

    def add(self, entry: Entry) -> Memory:
        """Write a candidate down; one that says the same as a known one of its family and scope is that one.

        Raises:
            RecordError: the entry breaks a bound, or `screen` refuses its text.
        """
        entry.check()
        if reason := screen(entry.text):
            raise RecordError(f"the entry was refused: {reason}.", "Write what was learnt in plain words.")
        known = self.store.memory(entry.id) or self._same(entry)
        if known is not None:
            return known
        self._record(Added(entry=entry))
        return self._memory(entry.id)

    def report(self, entry: str, trials: Sequence[Trial]) -> Decision:
        """Take in trials of a candidate, however many came back together, and decide if the evidence allows it.

        Raises:
            RecordError: there is no such entry, or a trial breaks a bound; none was taken in.
        """
        memory = self._memory(entry)
        for trial in trials:
            trial.check()
            gain(trial, self.policy)
        known = self.store.trials(memory)
        fresh = {trial.id: trial for trial in trials if trial.id not in known}
        if fresh:
            self._record(*(Tried(entry=entry, trial=trial) for trial in fresh.values()))
        decision = self.judge(memory, [*known.values(), *fresh.values()])
        if memory.status == "candidate" and decision.verdict != "continue":
            self._close_admission(memory, decision)
        return decision

    def judge(self, memory: Memory, trials: Iterable[Trial]) -> Decision:
        """What `trials` say of a memory today: nothing is recorded."""
        counted, num_leaks = evidence(memory.entry, trials)
        level = discovery_level(
            self.store.number_of(memory.id), self.store.discoveries(), self.policy.false_discovery_rate
        )
        gains = [gain(trial, self.policy) for trial in counted]
        return decide(gains, level=level, policy=self.policy, num_leaks=num_leaks)

    def audit(self, event: Event) -> str:
        """What is wrong with a recorded decision (`audit.audit`); empty where it holds."""
        return audit(self.store, self.policy, event)

    def undo_false_claims(self) -> list[str]:
        """Audit what other nodes admitted, and take back what does not hold; gives those events' ids.

        Call it once their trials have come as well: a decision without its trials does not hold.
        """
        undone: list[str] = []
        # What followed from a false claim is found once that is gone.
        while false := false_claims(self.store, self.policy):
            self.undo(false)
            undone += false
        return undone

    def _close_admission(self, memory: Memory, decision: Decision) -> None:
        accepted = decision.verdict == "accept"
        weight = max(0.0, decision.mean) if accepted else 0.0
        active = list(self.store.memories("active"))
        room = make_room(active, memory, weight, self.budget, _now_us()) if accepted else []
        if room is None:
            # What is there earns more: the candidate helps, and still has no place.
            accepted, weight, room = False, 0.0, []
        verdict = Decided(
            entry=memory.id,
            accepted=accepted,
            reason=decision.reason if accepted or decision.verdict == "reject" else "no room",
            weight=weight,
            candidate=self.store.number_of(memory.id),
            discoveries=self.store.discoveries(),
            num_trials=decision.num_trials,
            log_e=decision.log_e,
        )
        self._record(*room, verdict)
        if accepted:
            self._abstract(memory, weight)

    def _abstract(self, memory: Memory, weight: float) -> None:
        """Right after admission: the abstract form, at gamma times the weight, where there is one and room for it."""
        form = abstract(memory.entry)
        if form is None or self.store.memory(form.id) is not None:
            return
        self._record(Added(entry=form))
        twin = self._memory(form.id)
        room = make_room(list(self.store.memories("active")), twin, TRANSFER * weight, self.budget, _now_us())
        if room is not None:
            self._record(*room, self._follows(twin, TRANSFER * weight, "abstract form", (memory.id,)))

    def diffuse(self, entry: str, family: str) -> Memory | None:
        """The abstract form of a memory as a candidate in another family, where it must earn evidence of its own."""
        form = abstract(self._memory(entry).entry, family)
        return None if form is None else self.add(form)

    def _follows(self, memory: Memory, weight: float, reason: str, members: tuple[str, ...]) -> Decided:
        return Decided(
            entry=memory.id,
            accepted=True,
            reason=reason,
            weight=weight,
            candidate=self.store.number_of(memory.id),
            discoveries=self.store.discoveries(),
            num_trials=0,
            log_e=0.0,
            members=members,
        )

    # -- use

    def search(self, query: str, k: int = 5, *, family: str = "", scope: Scope | None = None) -> list[Found]:
        """The best memories for `query`, by similarity times weight.

        Args:
            family: of one environment only; empty for all.
            scope: who asks: entries of other users, agents or runs are not shown to it. None shows everything.
        """
        if not self.index:
            return []
        vector = self.embedder.embed([query])[0]
        allowed, scan = None, self.index.scan
        if family or scope is not None:
            shown = self.store.visible(family, scope)
            allowed = np.zeros(max(shown, default=-1) + 1, np.bool_)
            allowed[shown] = True
            scan *= SCOPED_EXTRA
        now_us = _now_us()
        found: list[Found] = []
        for number, product in self.index.search(vector, k, allowed=allowed, scan=scan):
            memory = self.store.by_number(number)
            if memory is not None and (weight := memory.weight_at(now_us)) > 0:
                found.append(Found(memory, product / _indexed_weight(memory), weight))
        return found

    def recall(
        self,
        query: str,
        *,
        max_tokens: int,
        count_tokens: CountTokens,
        k: int = 5,
        family: str = "",
        scope: Scope | None = None,
    ) -> Recall:
        """A block for a prompt: at most `k` memories within `max_tokens`, marked as recalled data."""
        found = self.search(query, k, family=family, scope=scope)
        return compose([item.memory.entry for item in found], max_tokens=max_tokens, count_tokens=count_tokens)

    def used(self, entries: Sequence[str], utility: float) -> None:
        """An agent was shown `entries`; `utility` in [-1, 1] is its reward less what such tasks earn without them."""
        bodies: list[AnyBody] = []
        for entry in entries:
            if len(self._recent) == RECENT_USES:
                self._shares[self._recent[0]] -= 1
            self._recent.append(entry)
            self._shares[entry] += 1
            self._used_since[entry] += 1
            bodies.append(Used(entry=entry, utility=utility, share=self._shares[entry] / len(self._recent)))
        self._record(*bodies)

    # -- upkeep

    def maintain(self) -> int:
        """Merge what says the same, fade what is passed over, prune, and save the index; gives the changes."""
        changes = self._merge_alike() + self._fade() + self._enforce_budget()
        if self.index.wants_training:
            self.index.train()
        self.index.save(self._index_folder)
        return changes

    def _merge_alike(self) -> int:
        done = 0
        for memory in list(self.store.memories("active")):
            current = self.store.memory(memory.id)
            if current is None or current.id != memory.id or current.status != "active":
                continue
            for other, similarity in self._neighbours(memory.entry):
                if may_merge(current, other, similarity):
                    self._merge(current, other)
                    done += 1
                    break
        return done

    def _merge(self, first: Memory, second: Memory) -> None:
        """One memory of two, its weight made anew from the union of their trials, each counted once."""
        pooled = {**self.store.trials(first), **self.store.trials(second)}
        self._record(merge(first, second))
        memory = self._memory(first.id)
        gains = [gain(t, self.policy) for t in evidence(memory.entry, pooled.values())[0]]
        mean = sum(gains) / len(gains) if gains else max(first.weight, second.weight)
        # Use has said more since: pooling may not lift a weight above what use left of both.
        weight = min(max(0.0, mean), max(first.weight, second.weight))
        self._record(self._follows(memory, weight, "merged", memory.members))

    def _fade(self) -> int:
        faded = fade(list(self.store.memories("active")), self._used_since)
        if faded:
            self._record(*faded)
            self._used_since.clear()
        return len(faded)

    def _enforce_budget(self) -> int:
        """Prune in passes, each capped and each undoable, until what is expired is gone and the budget holds."""
        removed = 0
        while chosen := prune(list(self.store.memories("active")), self.budget, _now_us()):
            self._record(*chosen)
            removed += len(chosen)
        return removed

    def remove(self, entry: str) -> None:
        """Take a memory out of retrieval, by hand."""
        self._record(Removed(entry=self._memory(entry).id, reason="by hand"))

    def forget_user(self, user: str) -> None:
        """Erase everything in a user's scope, its text on disk too; this cannot be undone."""
        if not user:
            raise ConfigError("no user was named.", "What belongs to nobody in particular is removed entry by entry.")
        self._record(Erased(user=user))
        self._index_anew()

    def undo(self, event_ids: Sequence[str]) -> None:
        """Let events count as if they had never happened, and then keep the budget."""
        for start in range(0, len(event_ids), MAX_TARGETS):
            self._record(Undone(targets=tuple(event_ids[start : start + MAX_TARGETS])))
        self._enforce_budget()

    def restore(self, position: int) -> None:
        """Go back to the state after event number `position`, by undoing all that came later; undoable itself."""
        self.undo(self.store.ids_since(position))

    def receive(self, events: Iterable[Event]) -> int:
        """Take in another node's events; gives how many were new."""
        brought = list(events)
        new = self.store.append(brought)
        self._follow()
        if any(isinstance(event.body, Erased) for event in brought):
            self._index_anew()
        self._enforce_budget()
        return new

    # -- within

    def _memory(self, entry: str) -> Memory:
        memory = self.store.memory(entry)
        if memory is None:
            raise RecordError(f"there is no memory {entry[:40]!r}.", "`shoal memory list` shows those there are.")
        return memory

    def _same(self, entry: Entry) -> Memory | None:
        for other, _ in self._neighbours(entry):
            alike = (other.entry.family, other.entry.scope) == (entry.family, entry.scope)
            if alike and other.status in ("candidate", "active") and same_words(other.entry.text, entry.text):
                return other
        return None

    def _neighbours(self, entry: Entry) -> list[tuple[Memory, float]]:
        """The likeliest duplicates of an entry among active memories, with their similarity."""
        vector = self.embedder.embed([entry.text])[0]
        found = []
        for number, product in self.index.search(vector, NEIGHBOURS):
            memory = self.store.by_number(number)
            if memory is not None and memory.id != entry.id:
                found.append((memory, product / _indexed_weight(memory)))
        return found

    def _record(self, *bodies: AnyBody) -> None:
        self.store.record(*bodies)
        self._follow()

    def _index_anew(self) -> None:
        """Forget the index, in memory and on disk: a vector tells of the text that it was made of."""
        shutil.rmtree(self._index_folder, ignore_errors=True)
        self.index = VectorIndex(self.embedder.dimensions)
        self._follow()

    def _follow(self) -> None:
        """Bring the index level with the store."""
        for number, entry, memory, kept in list(self.store.numbers(self.index.position)):
            weight = _indexed_weight(memory) if memory is not None and memory.status == "active" else 0.0
            if number in self.index:
                self.index.set_weight(number, weight)
            elif memory is not None and weight > 0:
                vector = np.frombuffer(kept, "<f4") if kept else self.embedder.embed([memory.entry.text])[0]
                if len(vector) != self.embedder.dimensions:
                    vector, kept = self.embedder.embed([memory.entry.text])[0], None
                if not kept:
                    self.store.set_vector(entry, vector)
                self.index.add(number, vector, weight)
        self.index.position = self.store.position


def _now_us() -> int:
    return time.time_ns() // 1000


def _indexed_weight(memory: Memory) -> float:
    """w as of `REFERENCE_US`, so that products compare whenever they are asked for."""
    since_s = (max(memory.created_us, memory.last_used_us) - REFERENCE_US) / 1e6
    return memory.weight * math.exp2(min(100.0, max(-100.0, since_s / HALF_LIFE_S)))
