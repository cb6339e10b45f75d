"""`shoal memory`: what a node remembers, why it was admitted, and how to take it back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from cyclopts import App

from shoal.cli import memory_trials
from shoal.cli.memory_store import SHORT_ID_CHARS, entry_of, found_by, opened, row, shortened
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError, RecordError

app = App(name="memory", help="See what is remembered, check why, and take it back.")
app.command(memory_trials.replay)
app.command(memory_trials.learn)
app.command(memory_trials.join)

EXPORT_EVENTS = 1000
"""Events read from the store at once."""


@app.command(name="list")
def list_(
    *, folder: Path | None = None, status: str = "active", family: str = "", user: str = "", json: Json = False
) -> None:
    """List memories, the weightiest first.

    For example:

        shoal memory list
        shoal memory list --status rejected --json

    Args:
        folder: Where the memories are; by default memory/ in Shoal's data directory.
        status: active, candidate, demoted, rejected, removed, or all.
        family: Only those about this environment.
        user: Only those of this user.
    """
    states = ("active", "candidate", "demoted", "rejected", "removed")
    if status not in (*states, "all"):
        raise ConfigError(f"there is no status {status!r}.", f"It is one of: {', '.join(states)}, all.")
    now_us = time.time_ns() // 1000
    with opened(folder, must_exist=True) as keeper:
        found = [
            memory
            for memory in keeper.store.memories(*(states if status == "all" else (status,)))
            if family in ("", memory.entry.family) and user in ("", memory.entry.scope.user)
        ]
        held = keeper.store.held()
    found.sort(key=lambda memory: (-memory.weight_at(now_us), memory.id))
    if json:
        rows = [row(memory, now_us) for memory in found]
        print_json({"memories": rows, "active": held[0], "active_bytes": held[1]})
        return
    for memory in found:
        line = f"{memory.id[:SHORT_ID_CHARS]}  {memory.weight_at(now_us):.3f}  {memory.uses:6}  "
        console().print(
            f"{line}{memory.status:10}{memory.entry.family}: {shortened(memory.entry.text)}",
            markup=False,
            soft_wrap=True,
        )
    note(f"{len(found)} shown; {held[0]} active, {held[1]} bytes.")


@app.command
def show(entry: str, /, *, folder: Path | None = None, json: Json = False) -> None:
    """Show one memory: its words, where it comes from, how it stands, and every event that made it so.

    For example:

        shoal memory show 3f9c2a

    Args:
        entry: The beginning of its id.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.protocol.codec import builtins

    now_us = time.time_ns() // 1000
    with opened(folder, must_exist=True) as keeper:
        memory = found_by(keeper, entry)
        history = keeper.store.history(memory)
        num_trials = len(keeper.store.trials(memory))
    if json:
        events = [{"id": event.id, **builtins(event)} for event in history]
        print_json({**row(memory, now_us), "trials": num_trials, "events": events})
        return
    terminal = console()
    terminal.print(memory.entry.text, markup=False, soft_wrap=True)
    for name, value in {**row(memory, now_us), "trials": num_trials}.items():
        if name != "text":
            terminal.print(f"{name:12} {value}", markup=False, soft_wrap=True)
    for event in history:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at_us / 1e6))
        kind = type(event.body).__name__.lower()
        terminal.print(f"{event.id[:SHORT_ID_CHARS]}  {when}  {event.node}  {kind}", markup=False, soft_wrap=True)


@app.command
def audit(entry: str = "", /, *, folder: Path | None = None, json: Json = False) -> int:
    """Recompute admissions from the trials that are kept: one memory's, or all.

    The exit code is 1 if one does not hold.

    For example:

        shoal memory audit
        shoal memory audit 3f9c2a --json

    Args:
        entry: The beginning of a memory's id; by default all memories.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.memory.events import Decided

    rows: list[dict[str, Any]] = []
    with opened(folder, must_exist=True) as keeper:
        for memory in [found_by(keeper, entry)] if entry else list(keeper.store.memories()):
            for event in keeper.store.history(memory):
                if isinstance(event.body, Decided):
                    rows.append(
                        {
                            "entry": event.body.entry,
                            "event": event.id,
                            "accepted": event.body.accepted,
                            "trials": event.body.num_trials,
                            "wrong": keeper.audit(event),
                        }
                    )
    wrong = [row for row in rows if row["wrong"]]
    if json:
        print_json({"decisions": rows, "wrong": len(wrong)})
    else:
        for row in wrong:
            console().print(f"{row['entry'][:SHORT_ID_CHARS]}  {row['wrong']}", markup=False, soft_wrap=True)
        note(f"{len(rows)} decisions recomputed, {len(wrong)} do not hold.")
    return 1 if wrong else 0


@app.command
def undo(event: str = "", /, *, back_to: int | None = None, folder: Path | None = None, json: Json = False) -> None:
    """Take one event back, or everything since a position; undoing an undo brings it back.

    For example:

        shoal memory undo 8b1d55
        shoal memory undo --back-to 1200

    Args:
        event: The beginning of an event's id, as show prints it.
        back_to: Undo all that came after this many events.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    if (not event) == (back_to is None):
        raise ConfigError("undo takes an event or --back-to, and one of them.", "See shoal memory undo --help.")
    with opened(folder, must_exist=True) as keeper:
        before = keeper.store.position
        if back_to is not None:
            if not 0 <= back_to <= before:
                raise ConfigError(f"there is no position {back_to}.", f"The store has {before} events.")
            targets = keeper.store.ids_since(back_to)
        else:
            targets = [i for i in keeper.store.ids_since(0) if i.startswith(event)]
            if len(targets) != 1:
                raise RecordError(f"{len(targets)} events begin with {event!r}.", "`shoal memory show` lists them.")
        keeper.undo(targets)
    if json:
        print_json({"undone": len(targets), "position_before": before})
        return
    note(f"{len(targets)} events undone; back again by: shoal memory undo --back-to {before}")


@app.command
def add(
    text: str,
    /,
    *,
    family: str,
    user: str = "",
    ttl_days: float = 0.0,
    folder: Path | None = None,
    json: Json = False,
) -> None:
    """Write a candidate down; it is used once trials have shown that it helps.

    For example:

        shoal memory add "Write the carry above the next column." --family arithmetic

    Args:
        text: What to remember.
        family: The environment whose tasks it is about.
        user: Whom it is for; by default everybody.
        ttl_days: Days until it expires; 0 keeps it.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    entry = entry_of(text, family=family, user=user, ttl_s=ttl_days * 86400.0)
    with opened(folder) as keeper:
        position = keeper.store.position
        memory = keeper.add(entry)
        new = keeper.store.position > position
    if json:
        print_json({"id": memory.id, "status": memory.status, "new": new})
        return
    console().print(f"{memory.id}  {memory.status}", markup=False)


@app.command
def search(
    query: str, /, *, count: int = 5, family: str = "", user: str = "", folder: Path | None = None, json: Json = False
) -> None:
    """Find memories by what they say: likeness times weight.

    For example:

        shoal memory search "adding two columns" --family arithmetic

    Args:
        query: What is wanted, in words.
        count: Memories, at most.
        family: Only those about this environment.
        user: Who asks: others' own memories are not shown.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.memory.records import Scope

    if not 1 <= count <= 1000:
        raise ConfigError(f"--count {count} is not between 1 and 1000.")
    with opened(folder, must_exist=True) as keeper:
        found = keeper.search(query, count, family=family, scope=Scope(user=user))
    if json:
        now_us = time.time_ns() // 1000
        rows = [{**row(one.memory, now_us), "similarity": one.similarity, "score": one.score} for one in found]
        print_json({"memories": rows})
        return
    for one in found:
        line = f"{one.memory.id[:SHORT_ID_CHARS]}  {one.score:.3f}  {one.memory.entry.family}: "
        console().print(f"{line}{shortened(one.memory.entry.text)}", markup=False, soft_wrap=True)
    note(f"{len(found)} found.")


@app.command
def prune(*, folder: Path | None = None, json: Json = False) -> None:
    """Merge what says the same, and remove what is expired, harms, or exceeds the budget.

    A pass removes a tenth of the active memories at most; all of it can be undone.

    For example:

        shoal memory prune

    Args:
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    with opened(folder, must_exist=True) as keeper:
        before, count = keeper.store.position, keeper.store.held()[0]
        changes = keeper.maintain()
        left = keeper.store.held()[0]
    if json:
        print_json({"changes": changes, "active_before": count, "active": left, "position_before": before})
        return
    note(f"{changes} changes, {left} of {count} left; back again by: shoal memory undo --back-to {before}")


@app.command
def delete(entry: str = "", /, *, user: str = "", folder: Path | None = None, json: Json = False) -> None:
    """Take a memory out of use, or erase everything of a user, its text on disk too.

    A memory that is taken out stays as evidence and can be brought back; what is erased is gone.

    For example:

        shoal memory delete 3f9c2a
        shoal memory delete --user ann

    Args:
        entry: The beginning of a memory's id.
        user: Erase all that is of this user.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    if bool(entry) == bool(user):
        raise ConfigError("delete takes a memory or --user, and one of them.", "See shoal memory delete --help.")
    with opened(folder, must_exist=True) as keeper:
        before = keeper.store.position
        if user:
            keeper.forget_user(user)
        else:
            keeper.remove(found_by(keeper, entry).id)
    if json:
        print_json({"deleted": user or entry, "erased": bool(user), "position_before": before})
    elif user:
        note(f"everything of {user} is erased.")
    else:
        note(f"taken out; back again by: shoal memory undo --back-to {before}")


@app.command
def export(output: Path | None = None, /, *, folder: Path | None = None, json: Json = False) -> None:
    """Write all events as JSON Lines: enough to rebuild the memories anywhere, evidence included.

    For example:

        shoal memory export memories.jsonl

    Args:
        output: Where to write; by default standard output.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.errors import StorageError
    from shoal.protocol.codec import to_json

    if output is None and json:
        raise ConfigError("--json and the events cannot both have standard output.", "Name a file.")
    count = position = 0
    with opened(folder, must_exist=True) as keeper:
        try:
            with output.open("wb") if output else open(sys.stdout.fileno(), "wb", closefd=False) as file:
                while True:
                    events, position = keeper.store.events_since(before := position, EXPORT_EVENTS)
                    for event in events:
                        file.write(to_json(event) + b"\n")
                    count += len(events)
                    if position == before:
                        break
        except OSError as error:
            raise StorageError(f"{output} cannot be written: {error.strerror}.", "Name another file.") from None
    if json:
        print_json({"file": str(output), "events": count})
    else:
        note(f"{count} events written.")
