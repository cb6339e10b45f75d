"""An output folder for one command: made by its first call, continued by the same command with --resume.

Invariant: a folder that holds something else is never written to, and none is continued with other settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import RunError, StorageError


def claim(out: Path, settings: str, what: dict[str, Any], *, resume: bool) -> None:
    """Make the folder; or make sure that it is of the same command.

    Args:
        settings: name of the file that keeps `what`, JSON values that must not change.

    Raises:
        RunError: it is taken, not there to be resumed, or was begun with other settings.
        StorageError: its settings are damaged.
    """
    path = out / settings
    if resume:
        if not path.exists():
            raise RunError(f"there is nothing in {out} to go on with.", "Leave --resume out.")
        try:
            before = json.loads(path.read_text())
            changed = sorted(key for key in {*what, *before} if before.get(key) != what.get(key))
        except (ValueError, TypeError, AttributeError):
            raise StorageError(f"{path} is damaged.", "Begin anew in another folder.") from None
        if changed:
            raise RunError(f"{out} was begun with another {changed[0]}.", "Repeat the first command, and add --resume.")
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty.", "Give another folder, or add --resume to go on.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what, indent=1))
