"""A run as a tree for the terminal: its decisions, and below each its calls and how far they are."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from shoal.agents.scheduler.calls import CallState
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.outcome import Failure, Success

MAX_CALLS_SHOWN = 24
"""Of one decision."""

MAX_CHARS = 100

MARKS = {"done": "✓", "running": "▶", "backoff": "↻", "approval": "?", "dispatched": "…", "ready": "…", "waiting": "·"}


def tree_of(state: RunState) -> Tree:
    """The tree; texts from models and tools are shown as they are, never as markup."""
    task = state.request.task if state.request is not None else ""
    tree = Tree(Text(_line(task), style="bold"))
    for number, step in enumerate(state.steps, start=1):
        words = step.problem or step.thought or ("answers" if step.answer is not None else "calls")
        branch = tree.add(Text(_line(f"{number}. {words}"), style="yellow" if step.problem else ""))
        held = state.calls.held()
        for name in step.calls[:MAX_CALLS_SHOWN]:
            if (call := held.get(name)) is not None:
                branch.add(_call(name, call))
        if len(step.calls) > MAX_CALLS_SHOWN or any(name not in held for name in step.calls):
            done = sum(name not in held or held[name].outcome is not None for name in step.calls)
            branch.add(Text(f"… {len(step.calls)} calls, {done} done", style="dim"))
        if step.answer is not None:
            branch.add(Text(_line(step.answer), style="green"))
    return tree


def _call(name: str, call: CallState) -> Text:
    failed = isinstance(call.outcome, Failure)
    mark = "✗" if failed else MARKS[call.phase]
    again = f" (attempt {call.attempts})" if call.attempts > 1 else ""
    text = Text(_line(f"{mark} {name} {call.call.tool}{again}"), style="red" if failed else "")
    if isinstance(call.outcome, Success):
        text.append(_line(f" → {call.outcome.value}"), style="dim")
    elif isinstance(call.outcome, Failure):
        text.append(_line(f" → {call.outcome.kind}: {call.outcome.message}"), style="dim")
    return text


def _line(text: str) -> str:
    """One line without control characters."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= MAX_CHARS else f"{flat[: MAX_CHARS - 1]}…"
