"""A state is a function of a set of events; the store's tables are that function, whatever comes in which order."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_makers import make_context, make_entry, make_trial

from shoal.errors import RecordError, StorageError
from shoal.memory.events import (
    Added,
    AnyBody,
    Decided,
    Erased,
    Event,
    Faded,
    Merged,
    Noted,
    Removed,
    Tried,
    Undone,
    Used,
)
from shoal.memory.records import Scope
from shoal.memory.state import Memory, fold, void_events
from shoal.memory.store import Store
from shoal.protocol.codec import decode, encode

ENTRIES = [make_entry(f"entry number {n}", user="ann" if n % 3 == 0 else "") for n in range(6)]
CONTEXT = make_context()


def accepted(entry: str, weight: float, candidate: int = 1) -> Decided:
    return Decided(
        entry=entry,
        accepted=True,
        reason="helps",
        weight=weight,
        candidate=candidate,
        discoveries=0,
        num_trials=9,
        log_e=5.0,
    )


def draw_body(draw: random.Random, known: list[Event]) -> AnyBody:
    entry, other = draw.sample(ENTRIES, 2)
    kind = draw.choices(
        ("added", "decided", "refused", "used", "merged", "removed", "undone", "erased", "tried", "faded"),
        (6, 5, 2, 8, 4, 1, 4, 1, 2, 2),
    )[0]
    match kind:
        case "added":
            return Added(entry=entry)
        case "decided":
            return accepted(entry.id, draw.random())
        case "refused":
            return Decided(
                entry=entry.id,
                accepted=False,
                reason="futile",
                weight=0,
                candidate=1,
                discoveries=0,
                num_trials=9,
                log_e=-1,
            )
        case "used":
            return Used(entry=entry.id, utility=draw.uniform(-1, 1), share=draw.random())
        case "faded":
            return Faded(entry=entry.id, factor=draw.random())
        case "merged":
            return Merged(first=entry.id, second=other.id)
        case "removed":
            return Removed(entry=entry.id, reason="by hand")
        case "erased":
            return Erased(user="ann")
        case "undone" if known:
            return Undone(targets=tuple(e.id for e in draw.sample(known, min(len(known), draw.randint(1, 3)))))
        case _:
            return Tried(entry=entry.id, trial=make_trial(draw.randint(0, 9), 0, 1))


def draw_events(seed: int, count: int) -> list[Event]:
    """A history of two nodes whose clocks run together, as they do while apart."""
    draw = random.Random(seed)
    events: list[Event] = []
    for number in range(count):
        at = number + draw.randint(0, 3)
        events.append(Event(at_us=at, node=draw.choice("xy"), body=draw_body(draw, events)))
    return events


def scratch() -> tempfile.TemporaryDirectory[str]:
    """In memory where the system has such a folder: hundreds of small stores would wait for the disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def told(store: Store) -> set[str]:
    """Ids of what a node can tell another."""
    return {event.id for event in store.events_since(0, limit=10**6)[0]}


def tables(store: Store) -> dict[str, Memory]:
    return {memory.id: memory for memory in store.memories()}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 60))
def test_fold_depends_on_the_set_alone(seed: int, count: int) -> None:
    events = draw_events(seed, count)
    shuffled = random.Random(seed + 1).sample(events, len(events)) + events[:7]
    assert fold(shuffled) == fold(events)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 50), batch=st.integers(1, 9))
@example(seed=52, count=37, batch=1)  # a late merge with an erased entry took the other's events with it
def test_store_equals_fold_in_whatever_order_events_come(seed: int, count: int, batch: int) -> None:
    events = draw_events(seed, count)
    arriving = random.Random(seed + 1).sample(events, len(events))
    with scratch() as folder, Store(Path(folder) / "m.db", "n") as store:
        for start in range(0, len(arriving), batch):
            store.append(arriving[start : start + batch])
        assert tables(store) == fold(events)
        assert store.append(events) == 0
        rows = sqlite3.connect(Path(folder) / "m.db").execute("SELECT id, void FROM events WHERE kind != 'erased'")
        assert {i for i, void in rows if void} == void_events(events)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), steps=st.lists(st.sampled_from(["x", "y", "heal", "heal"]), max_size=30))
def test_two_nodes_converge_under_partition_and_heal(seed: int, steps: list[str]) -> None:
    draw = random.Random(seed)
    with scratch() as folder:
        stores = {name: Store(Path(folder) / f"{name}.db", name) for name in "xy"}
        seen = {"x": 0, "y": 0}
        heard: dict[str, list[Event]] = {"x": [], "y": []}

        def heal() -> None:
            for name, other in (("x", "y"), ("y", "x")):
                while True:
                    events, seen[name] = stores[name].events_since(seen[name], limit=3)
                    if not events:
                        break
                    stores[other].append(random.Random(seed).sample(events, len(events)))
                    heard[other] += events

        for action in steps:
            if action == "heal":
                heal()
            else:
                heard[action] += stores[action].record(draw_body(draw, heard[action]))
        heal()
        heal()
        assert tables(stores["x"]) == tables(stores["y"])
        assert tables(stores["x"]) == fold([*heard["x"], *heard["y"]])
        # What was erased before it was told lives on as an empty line at home alone.
        assert told(stores["x"]) == told(stores["y"])
        for store in stores.values():
            store.close()


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), back=st.integers(0, 30))
def test_any_past_state_can_be_restored_and_the_restoring_undone(seed: int, count: int, back: int) -> None:
    draw = random.Random(seed)
    with scratch() as folder, Store(Path(folder) / "m.db", "n") as store:
        states, known = [tables(store)], []
        for _ in range(count):
            body = draw_body(draw, known)
            if isinstance(body, Erased):
                continue
            known += store.record(body)
            states.append(tables(store))
        for position, state in enumerate(states):
            assert store.state_at(position) == state
        position = max(0, len(states) - 1 - back)
        later = store.ids_since(position)
        if later:
            (undo,) = store.record(Undone(targets=tuple(later)))
            assert tables(store) == states[position]
            store.record(Undone(targets=(undo.id,)))
            assert tables(store) == states[-1]


def test_merging_both_ways_at_once_counts_every_use_and_trial_once(tmp_path: Path) -> None:
    a, b = ENTRIES[1].id, ENTRIES[2].id
    first = [Event(at_us=n, node="x", body=Added(entry=ENTRIES[n])) for n in (1, 2)]
    first += [Event(at_us=3 + n, node="x", body=accepted(e, 0.5)) for n, e in enumerate((a, b))]
    uses = [Event(at_us=10 + n, node="x", body=Used(entry=(a, b)[n % 2], utility=0.1, share=0)) for n in range(6)]
    trials = [
        Event(at_us=20 + n, node="x", body=Tried(entry=(a, b)[n % 2], trial=make_trial(n // 3, 0, 1))) for n in range(6)
    ]
    merges = [
        Event(at_us=30, node="x", body=Merged(first=a, second=b)),
        Event(at_us=30, node="y", body=Merged(first=b, second=a)),
    ]
    with Store(tmp_path / "m.db", "n") as store:
        store.append([*first, *uses, *trials, *merges])
        (memory,) = tables(store).values()
        assert memory.id == a and set(memory.members) == {a, b}
        assert memory.uses == 6
        assert len(store.trials(memory)) == 2
        assert store.memory(b) == memory
        # Undoing one of the two merges leaves the other in force; undoing both parts them as they were.
        store.record(Undone(targets=(merges[0].id,)))
        assert len(tables(store)) == 1
        store.record(Undone(targets=(merges[1].id,)))
        assert {m.id: m.uses for m in store.memories()} == {a: 3, b: 3}


def test_an_erased_user_is_gone_from_the_files_and_cannot_be_brought_back(tmp_path: Path) -> None:
    secret = "ann hides her key under the blue stone"
    entry = make_entry(secret, user="ann")
    context = make_context(action=secret)
    context = type(context)(
        **{f: getattr(context, f) for f in context.__struct_fields__ if f != "scope"}, scope=Scope(user="ann")
    )
    path = tmp_path / "m.db"
    with Store(path, "n") as store:
        old = store.record(Noted(context=context), Added(entry=entry), accepted(entry.id, 1.0))
        (kept,) = store.record(Added(entry=make_entry("a note for all")))
        assert store.context(context.id) == context
        (erased,) = store.record(Erased(user="ann"))
        assert [m.entry.text for m in store.memories()] == ["a note for all"]
        assert store.context(context.id) is None
        assert store.append(old) == 0, "its ids are known: it is not taken in again"
        store.record(Undone(targets=(erased.id,)))
        assert store.memory(entry.id) is None
        late = Event(at_us=kept.at_us, node="other", body=Used(entry=entry.id, utility=0.5, share=0.0))
        store.append([late])
        assert all(e.id != late.id for e in store.events_since(0)[0])
        store.record(Added(entry=entry))
        assert store.memory(entry.id) is not None, "what is said after the erasure is new"
        store.record(Erased(user="ann"))
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in data


def test_trouble_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with Store(tmp_path / "m.db", "n") as store:
        good = Event(at_us=1, node="x", body=Added(entry=ENTRIES[0]))
        future = Event(at_us=time.time_ns() // 1000 + 2 * 3600 * 10**6, node="x", body=Added(entry=ENTRIES[1]))
        with pytest.raises(RecordError, match="future"):
            store.append([good, future])
        with pytest.raises(RecordError):
            store.append([good, Event(at_us=1, node="x", body=Used(entry="no hash", utility=0, share=0))])
        assert not tables(store) and store.position == 0
        assert decode(encode(good), Event).id == good.id
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="cannot be opened"):
        Store(bad, "n")
    sqlite3.connect(tmp_path / "m.db").execute("UPDATE meta SET value = '0' WHERE key = 'rules'").connection.commit()
    with pytest.raises(StorageError, match="other rules"):
        Store(tmp_path / "m.db", "n")


WRITER = """
import sys
from pathlib import Path
from shoal.memory.events import Added, Used
from shoal.memory.records import Entry, Provenance
from shoal.memory.store import Store
store = Store(Path(sys.argv[1]), "w")
for n in range(10**6):
    entry = Entry(text=f"entry {n}", family="f", provenance=Provenance(rule="manual"))
    events = store.record(Added(entry=entry), Used(entry=entry.id, utility=0.5, share=0.0))
    sys.stdout.write(events[-1].id + "\\n")
    sys.stdout.flush()
"""


def test_kill_at_any_write_loses_nothing_acknowledged(tmp_path: Path) -> None:
    draw = random.Random(7)
    acknowledged: list[str] = []
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "m.db")], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randint(3, 40)):
                acknowledged.append(writer.stdout.readline().strip())
            time.sleep(draw.random() * 0.01)
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    with Store(tmp_path / "m.db", "n") as store:
        kept = store.ids_since(0)
        assert set(acknowledged) <= set(kept)
        assert len(kept) % 2 == 0, "half of a record was kept"
        assert tables(store) == store.state_at(store.position)
