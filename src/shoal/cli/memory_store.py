"""The store that `shoal memory` works on: opened, searched by the beginning of an id, shown as rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from shoal.memory.keeper import Keeper
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
