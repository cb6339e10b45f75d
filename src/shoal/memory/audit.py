"""Recomputing what was decided from the trials that are kept: here, or by whoever holds the same events.

Invariants: nothing is recorded and nobody is asked; a decision holds only if the trials that came before it give its
numbers and its verdict by the same policy, each signed by the node that is said to have run it; or, where it follows
from earlier decisions, if its weight is within theirs.
"""

from __future__ import annotations

from shoal.errors import RecordError
from shoal.memory.admission import AdmissionPolicy, decide, discovery_level, evidence, gain
from shoal.memory.controller import TRANSFER
from shoal.memory.events import Decided, Event, Tried
from shoal.memory.signing import ForgedEvent, check_trial
from shoal.memory.store import Store

AUDIT_TOLERANCE = 1e-9
"""Sums of logarithms may differ this much between machines."""


def audit(store: Store, policy: AdmissionPolicy, event: Event) -> str:
    """What is wrong with a recorded decision, recomputed from the trials kept here; empty where it holds.

    Raises:
        RecordError: the event is no decision.
    """
    body = event.body
    if not isinstance(body, Decided):
        raise RecordError(f"event {event.id} is no decision.", "`shoal memory show` lists a memory's events.")
    memory = store.memory(body.entry)
    if memory is None:
        return "its entry is not known here"
    if body.members:
        return _audit_following(store, policy, body, event)
    earlier = [
        other.body
        for other in store.history(memory)
        if isinstance(other.body, Tried) and other.body.entry == body.entry and other.order < event.order
    ]
    for tried in earlier:
        if tried.runner:
            try:
                check_trial(tried.entry, tried.trial, tried.runner, tried.signature)
            except ForgedEvent as error:
                return error.problem
    trials, num_leaks = evidence(memory.entry, (tried.trial for tried in earlier))
    level = discovery_level(body.candidate, body.discoveries, policy.false_discovery_rate)
    gains = [gain(trial, policy) for trial in trials]
    found = decide(gains, level=level, policy=policy, num_leaks=num_leaks)
    if found.num_trials != body.num_trials or abs(found.log_e - body.log_e) > AUDIT_TOLERANCE:
        return (
            f"{found.num_trials} trials with evidence {found.log_e:.6g} are kept, "
            f"and it names {body.num_trials} with {body.log_e:.6g}"
        )
    if body.accepted != (found.verdict == "accept") and body.reason != "no room":
        return f"the evidence says {found.verdict} ({found.reason}), and it says accepted = {body.accepted}"
    if body.accepted and abs(found.mean - body.weight) > AUDIT_TOLERANCE:
        return f"the mean gain is {found.mean:.6g}, and its weight {body.weight:.6g}"
    return ""


def _audit_following(store: Store, policy: AdmissionPolicy, body: Decided, event: Event) -> str:
    """For a decision that follows from earlier ones: its weight may not exceed what those and their trials gave."""
    most, share = 0.0, 1.0
    for member in body.members:
        memory = store.memory(member)
        if memory is None:
            return "it follows from an entry that is not known here"
        earlier = [e.body for e in store.history(memory) if e.order < event.order]
        given = (b.weight for b in earlier if isinstance(b, Decided) and b.accepted and b.entry == member)
        pooled, _ = evidence(memory.entry, (b.trial for b in earlier if isinstance(b, Tried)))
        gains = [gain(trial, policy) for trial in pooled]
        most = max(most, sum(gains) / max(1, len(gains)), *given)
    if body.entry not in body.members:
        share = TRANSFER
    if body.weight > share * most + AUDIT_TOLERANCE:
        return f"it follows from a weight of {most:.6g} at most, and its own is {body.weight:.6g}"
    return ""


def false_claims(store: Store, policy: AdmissionPolicy) -> list[str]:
    """Ids of other nodes' admissions in force, of memories that are active, that do not hold."""
    found: list[str] = []
    for memory in list(store.memories("active")):
        for event in store.history(memory):
            claim = isinstance(event.body, Decided) and event.body.accepted and event.node != store.node
            if claim and audit(store, policy, event):
                found.append(event.id)
    return found
