"""The store that `shoal memory` works on: opened, searched by the beginning of an id, shown as rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from shoal.memory.keeper import Keeper
    from shoal.memory.records import Entry
    from shoal.memory.state import Memory

SHORT_ID_CHARS = 10
SHOWN_CHARS = 72


def opened(folder: Path | None, *, must_exist: bool = False, vouched_only: bool = False) -> Keeper:
    """The memories in a folder, by default those of this machine; raises `ConfigError` where there must be some."""
    from shoal.fabric.identity import Identity, data_dir
    from shoal.memory.keeper import Keeper

    where = folder or data_dir() / "memory"
    if must_exist and not (where / "memory.db").exists():
        raise ConfigError(f"there are no memories in {where}.", "Name their folder by --folder, or add one.")
    return Keeper(where, Identity.load_or_create(data_dir()), vouched_only=vouched_only)


def entry_of(text: str, *, family: str, user: str = "", ttl_s: float = 0.0) -> Entry:
    """What a person wrote, as an entry; raises `RecordError` where it gives orders, or `screen` refuses it."""
    from shoal.memory.extract import screen
    from shoal.memory.records import Entry, Provenance, Scope
    from shoal.memory.screening import find_order, normalise

    shown = normalise(text)
    if order := find_order(text):
        raise RecordError(
            f"the text was refused: order to the reader: {order}.", "Write what was learnt in plain words."
        )
    if reason := screen(shown):
        raise RecordError(f"the text was refused: {reason}.", "Write what was learnt in plain words.")
    provenance = Provenance(rule="manual")
    return Entry(text=shown, family=family, scope=Scope(user=user), ttl_s=ttl_s, provenance=provenance)


def found_by(keeper: Keeper, prefix: str) -> Memory:
    """The one memory whose id begins so; raises `RecordError` where there is none or several."""
    found = keeper.store.find(prefix) if prefix else []
    if len(found) != 1:
        many = "several memories begin" if found else "no memory begins"
        raise RecordError(f"{many} with {prefix!r}.", "`shoal memory list --status all` shows them.")
    memory = keeper.store.memory(found[0])
    if memory is None:
        raise RecordError(f"the memory {prefix!r} is gone.", "`shoal memory list --status all` shows them.")
    return memory


def shortened(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[: SHOWN_CHARS - 1]}…"


def row(memory: Memory, now_us: int) -> dict[str, Any]:
    """A memory as the commands print it."""
    entry = memory.entry
    return {
        "id": memory.id,
        "status": memory.status,
        "weight": memory.weight_at(now_us),
        "utility": memory.utility,
        "uses": memory.uses,
        "family": entry.family,
        "user": entry.scope.user,
        "rule": entry.provenance.rule,
        "context": entry.provenance.context,
        "members": list(memory.members),
        "text": entry.text,
    }
