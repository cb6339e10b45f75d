"""TOML text to tables, with one error for everything that can be wrong with it.

Numbers of thousands of digits and values nested too deeply, which Python refuses in ways of its own, are no TOML.
"""

from __future__ import annotations

import tomllib
from typing import Any


class NoToml(ValueError):
    """A text that is not TOML; says why, and where."""


def tables_of(text: str) -> dict[str, Any]:
    """The tables in a text; raises `NoToml`."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise NoToml("its values are nested too deeply; use tables such as [learner.loss]") from None
    except ValueError as error:
        raise NoToml(str(error).partition("; use sys.")[0]) from None
