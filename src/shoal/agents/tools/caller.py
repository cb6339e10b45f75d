"""For which run a call is made, for tools that keep something for each run apart from the others' (a browser's page).

It goes with the call, in this process and to MCP servers of ours (`_meta`); it is a name and no right.
"""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("shoal_caller", default="")
"""The run's id; empty where a call is no run's."""

CALLER_META = "shoal/run"
MAX_CALLER_CHARS = 128
