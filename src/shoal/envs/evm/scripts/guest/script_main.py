"""Runs the agent's Python script and writes what it returned, or why it failed.

Preloaded into a warm sandbox; every script runs in a fork. Everything here is in the script's reach: it can change its
own result and nothing else.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

from shoal.envs.evm.scripts.guest.chain import Chain, from_wei, to_wei

MAX_ERROR_CHARS = 2_000


def main() -> None:
    """Read `task.json` and `skill.py`, write `result.json`."""
    task = json.loads(Path("task.json").read_text())
    try:
        outcome = json.dumps({"value": _run(task)}, default=_plain)
    except MemoryError:
        raise  # The sandbox says so.
    except Exception as error:  # noqa: BLE001 - whatever the script raised is its result
        outcome = json.dumps({"error": _describe(error)})
    Path("result.json").write_text(outcome)


def _run(task: dict[str, Any]) -> Any:
    source = Path("skill.py").read_text()
    scope: dict[str, Any] = {"__name__": "skill", "to_wei": to_wei, "from_wei": from_wei}
    exec(compile(source, "skill.py", "exec", dont_inherit=True), scope)
    skill = scope.get("execute_skill")
    if not callable(skill):
        raise TypeError("the script defines no function execute_skill")
    return skill(Chain(task), task["agent"], task["contracts"])


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    return str(value)


def _describe(error: Exception) -> str:
    """The error, and where in the script it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "skill.py"]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"[:MAX_ERROR_CHARS]
