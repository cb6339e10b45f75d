"""Guardrails: what may go into a run, into a tool, and out as an answer.

A guard is a function that gives the reason against something, or nothing. What a guard refuses becomes an observation
(calls, answers) or an error (tasks); the model may try another way within its budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TextGuard = Callable[[str], str]
"""Text in; the reason against it out, empty for none."""

CallGuard = Callable[[str, Mapping[str, Any]], str]
"""A tool's name and arguments in; the reason against the call out."""


@dataclass(frozen=True)
class Guards:
    """All of a process's guards; the first that objects is heard."""

    task: tuple[TextGuard, ...] = ()
    call: tuple[CallGuard, ...] = ()
    answer: tuple[TextGuard, ...] = ()

    def against_task(self, text: str) -> str:
        return next((reason for guard in self.task if (reason := guard(text))), "")

    def against_call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        return next((reason for guard in self.call if (reason := guard(tool, arguments))), "")

    def against_answer(self, text: str) -> str:
        return next((reason for guard in self.answer if (reason := guard(text))), "")


def at_most(max_chars: int) -> TextGuard:
    """Nothing longer than this."""
    return lambda text: f"it has {len(text)} characters; {max_chars} are allowed" if len(text) > max_chars else ""


def without(pattern: str, what: str) -> TextGuard:
    """Nothing that a regular expression finds; `what` names it for the model."""
    compiled = re.compile(pattern)
    return lambda text: f"it contains {what}" if compiled.search(text) else ""
