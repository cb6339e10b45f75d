"""How commands speak: results to standard output, everything else to standard error.

Invariants: with `--json`, standard output carries exactly one JSON object, errors included, and no nan or infinity
(they become null); what came from a model, a file or another machine is never read as markup.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.errors import ShoalError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where results for people go."""
    from rich.console import Console

    return Console(highlight=False)


def error_console() -> Console:
    """Where progress, notes and errors go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(result: Mapping[str, Any]) -> None:
    """The one JSON object of a command called with `--json`, on one line."""
    sys.stdout.write(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def note(message: str) -> None:
    """One line for people on standard error, whether or not the result is JSON."""
    terminal = error_console()
    terminal.print(message, style="dim", markup=False, soft_wrap=not terminal.is_terminal)


def print_error(error: ShoalError, *, as_json: bool = False) -> None:
    """One paragraph on standard error: what is wrong and what to do; with `as_json` also an object for machines."""
    from rich.text import Text

    terminal = error_console()
    text = Text.assemble(("Error: ", "bold red"), f"{error.problem} ", (error.remedy, "bold"))
    text.rstrip()
    terminal.print(text, soft_wrap=not terminal.is_terminal)
    if as_json:
        kind = type(error).__name__
        print_json({"error": {"kind": kind, "problem": error.problem, "remedy": error.remedy}})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
