"""One node's memories in use: the shell that ties the store to index, embedder, admission and controller.

Everything that is decided here is decided by pure functions elsewhere; this module fetches what they need, records what
they choose, and keeps the index level with the store. It drives no model: whoever runs replays calls `report`.

Invariants: the active memories never exceed the budget, not even between two calls (room is made in the transaction
that admits; a merge with another node's events is followed by pruning before anything is retrieved); only what is
active, in scope and not expired is retrieved; recalled text is never written down again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from shoal.errors import ConfigError, RecordError
from shoal.fabric.identity import Identity
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
    Vouched,
)
from shoal.memory.extract import same_words, screen
from shoal.memory.recall import CountTokens, Recall, compose
from shoal.memory.records import Context, Entry, Scope, Trial
from shoal.memory.retrieval import Found, Retrieval
from shoal.memory.signing import SignedEvent, SignedTrial, check_trial
from shoal.memory.state import Memory
from shoal.memory.store import Store

RECALL_SHARE = 0.6
"""A memory is shown with the best one for a question only if it scores this share of it."""

RECENT_USES = 256
"""f_use is an entry's share of this many latest uses."""


class Keeper:
    """Memories in one folder: `memory.db` and, beside it, a saved index. Close it, or use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        node: str | Identity,
        *,
        embedder: Embedder | None = None,
        policy: AdmissionPolicy | None = None,
        budget: Budget | None = None,
        vouched_only: bool = False,
    ) -> None:
        """
        Args:
            node: whose memories these are; with an identity their events are signed, and can be shared.
            vouched_only: show what other nodes admitted only once this one has replayed it (`verifying`).
        """
        self.embedder = embedder or HashedEmbedder(DIMENSIONS)
        self.policy, self.budget = policy or AdmissionPolicy(), budget or Budget()
        self.store = Store(folder / "memory.db", node)
        self.retrieval = Retrieval(self.store, self.embedder, folder, vouched_only=vouched_only)
        self._recent: deque[str] = deque(maxlen=RECENT_USES)
        self._shares: Counter[str] = Counter()
        self._used_since: Counter[str] = Counter()
        """Uses by memory since the last upkeep that found enough of them to judge by."""

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
        return self.memory(entry.id)

    def report(self, entry: str, trials: Sequence[Trial | SignedTrial]) -> Decision:
        """Take in trials of a candidate, however many came back together, and decide if the evidence allows it.

        Args:
            trials: of this node's own, or signed by the nodes that ran them.

        Raises:
            RecordError: there is no such entry, a trial breaks a bound or is forged; none was taken in.
        """
        memory = self.memory(entry)
        known = self.store.trials(memory)
        fresh: dict[str, Tried] = {}
        for one in trials:
            tried = _tried(entry, one)
            gain(tried.trial, self.policy)
            if tried.trial.id not in known:
                fresh.setdefault(tried.trial.id, tried)
        if fresh:
            self._record(*fresh.values())
        decision = self.judge(memory, [*known.values(), *(tried.trial for tried in fresh.values())])
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

    def vouch(self, entry: str, num_trials: int) -> None:
        """Stand by the admission of a memory that this node has replayed: from now on it is shown here."""
        memory = self.memory(entry)
        self._record(Vouched(entry=memory.id, admission=memory.admission, num_trials=num_trials))

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
        twin = self.memory(form.id)
        room = make_room(list(self.store.memories("active")), twin, TRANSFER * weight, self.budget, _now_us())
        if room is not None:
            self._record(*room, self._follows(twin, TRANSFER * weight, "abstract form", (memory.id,)))

    def diffuse(self, entry: str, family: str) -> Memory | None:
        """The abstract form of a memory as a candidate in another family, where it must earn evidence of its own."""
        form = abstract(self.memory(entry).entry, family)
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
        return self.retrieval.search(query, k, family=family, scope=scope)

    def recall(
        self,
        query: str,
        *,
        max_tokens: int,
        count_tokens: CountTokens,
        k: int = 5,
        family: str = "",
        scope: Scope | None = None,
        likeness: float = 0.0,
    ) -> Recall:
        """A block for a prompt: at most `k` memories within `max_tokens`, marked as recalled data.

        What scores far below the best is about something else, and left out.

        Args:
            likeness: memories less similar to the query than this are left out, too; what it should be depends on the
                embedder (for the hashing one, what is about something else lies below about 0.4).
        """
        found = [one for one in self.search(query, k, family=family, scope=scope) if one.similarity >= likeness]
        found = [item for item in found if item.score >= RECALL_SHARE * found[0].score]
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
        self.retrieval.save()
        return changes

    def _merge_alike(self) -> int:
        done = 0
        for memory in list(self.store.memories("active")):
            current = self.store.memory(memory.id)
            if current is None or current.id != memory.id or current.status != "active":
                continue
            for other, similarity in self.retrieval.neighbours(memory.entry):
                if may_merge(current, other, similarity):
                    self._merge(current, other)
                    done += 1
                    break
        return done

    def _merge(self, first: Memory, second: Memory) -> None:
        """One memory of two, its weight made anew from the union of their trials, each counted once."""
        pooled = {**self.store.trials(first), **self.store.trials(second)}
        self._record(merge(first, second))
        memory = self.memory(first.id)
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
        self._record(Removed(entry=self.memory(entry).id, reason="by hand"))

    def forget_user(self, user: str) -> None:
        """Erase everything in a user's scope, its text on disk too; this cannot be undone."""
        if not user:
            raise ConfigError("no user was named.", "What belongs to nobody in particular is removed entry by entry.")
        self._record(Erased(user=user))
        self.retrieval.anew()

    def undo(self, event_ids: Sequence[str]) -> None:
        """Let events count as if they had never happened, and then keep the budget."""
        for start in range(0, len(event_ids), MAX_TARGETS):
            self._record(Undone(targets=tuple(event_ids[start : start + MAX_TARGETS])))
        self._enforce_budget()

    def restore(self, position: int) -> None:
        """Go back to the state after event number `position`, by undoing all that came later; undoable itself."""
        self.undo(self.store.ids_since(position))

    def receive(self, events: Iterable[Event | SignedEvent]) -> int:
        """Take in another node's events; gives how many were new."""
        brought = list(events)
        new = self.store.append(brought)
        self.retrieval.follow()
        bodies = [one.event.body if isinstance(one, SignedEvent) else one.body for one in brought]
        if any(isinstance(body, Erased) for body in bodies):
            self.retrieval.anew()
        self._enforce_budget()
        return new

    # -- within

    def memory(self, entry: str) -> Memory:
        """The memory that holds an entry; raises `RecordError` where there is none."""
        memory = self.store.memory(entry)
        if memory is None:
            raise RecordError(f"there is no memory {entry[:40]!r}.", "`shoal memory list` shows those there are.")
        return memory

    def _same(self, entry: Entry) -> Memory | None:
        for other, _ in self.retrieval.neighbours(entry):
            alike = (other.entry.family, other.entry.scope) == (entry.family, entry.scope)
            if alike and other.status in ("candidate", "active") and same_words(other.entry.text, entry.text):
                return other
        return None

    def _record(self, *bodies: AnyBody) -> None:
        self.store.record(*bodies)
        self.retrieval.follow()


def _now_us() -> int:
    return time.time_ns() // 1000


def _tried(entry: str, trial: Trial | SignedTrial) -> Tried:
    """The event that a trial of an entry is, its signature checked where it has one."""
    if isinstance(trial, Trial):
        tried = Tried(entry=entry, trial=trial)
    else:
        check_trial(entry, trial.trial, trial.signer, trial.signature)
        tried = Tried(entry=entry, trial=trial.trial, runner=trial.signer, signature=trial.signature)
    tried.check()
    return tried
