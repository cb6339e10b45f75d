"""Shoal: post-train one open model on many machines that do not share a datacentre, and serve it there.

The house, floor by floor, is drawn in README.md; each room's `__init__` says what the room is for.
Importing this package loads nothing heavy: torch is imported only inside `engine` and `learner`, and the names of the
Python API (`shoal.api`) are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.api import Agent, Engine, Memory, Run, Swarm, evaluate

__version__ = "0.1.0"

PROTOCOL_VERSION = 3
"""Rises by one whenever a message between nodes changes shape; nodes of different versions refuse each other."""

__all__ = ["PROTOCOL_VERSION", "Agent", "Engine", "Memory", "Run", "Swarm", "__version__", "evaluate"]

_API = ("Agent", "Engine", "Memory", "Run", "Swarm", "evaluate")


def __getattr__(name: str) -> object:
    if name not in _API:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    import shoal.api

    return getattr(shoal.api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
