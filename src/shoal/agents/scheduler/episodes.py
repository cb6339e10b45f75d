"""A recorded run as an episode to train on, and as a context for memory. Pure: both are functions of its events.

Each decision is a turn: what the model had not read before, and what it drew, with the log-probabilities it was drawn
with. A run that ends with an answer, or uses up its budget, is the agent's own doing and `done`, with the reward that
whoever asked gives it; one that was cancelled, or whose model could not be reached, is `void`.

Invariant: tool results are taken from the log, so a replay asks no tool again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shoal.agents.scheduler.calls import outcome_of
from shoal.agents.scheduler.policy import View
from shoal.agents.scheduler.prompt import messages
from shoal.agents.scheduler.records import Drawn, RunEvent, RunRequest
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.outcome import Success
from shoal.errors import RunError
from shoal.memory.records import MAX_TOOL_RESULTS, Context, ToolResult
from shoal.memory.replay import pack
from shoal.protocol.episode import Episode, Task

ENVIRONMENT = "agents.run"
"""What a run's task names as its environment; the task's words are in its data."""

OWN_DOING = ("budget", "decisions", "context")
"""Reasons for which a run fails that are the agent's and not its surroundings'."""


def episode_of(events: Sequence[RunEvent], reward: float = 0.0) -> Episode:
    """The episode of a run that has ended.

    Args:
        events: all of them, in order.
        reward: what the run was worth, by whoever judges it.

    Raises:
        RunError: the run has not ended, or its tokens were not kept.
    """
    first, last = events[0], events[-1]
    if not last.is_last:
        raise RunError(f"the run {first.run} has not ended.", "Wait for its end, or resume it.")
    drawn = [msgspec.convert(e.data["drawn"], Drawn) for e in events if e.kind == "thought" and e.data.get("drawn")]
    if not drawn:
        raise RunError(
            f"the run {first.run} has no tokens in its log.",
            "Start it with record, and with a model in this process: an endpoint's text is no token.",
        )
    request = msgspec.convert(first.data["request"], RunRequest)
    reason = str(last.data.get("reason", ""))
    done = last.kind == "final" or reason in OWN_DOING
    return Episode(
        id=first.run,
        group=request.session or first.run,
        index=0,
        task=Task(env=ENVIRONMENT, id=first.run, seed=0, data={"task": request.task}),
        turns=tuple(one.turn for one in drawn),
        outcome="done" if done else "void",
        reward=reward if done else 0.0,
        void_reason="" if done else reason,
        temperature=drawn[0].temperature,
        started_at=first.time,
        finished_at=last.time,
    )


def tool_results(events: Sequence[RunEvent]) -> list[ToolResult]:
    """What every call that was made gave, in the order in which they ended."""
    asked: dict[str, dict[str, Any]] = {}
    found: list[ToolResult] = []
    for event in events:
        if event.kind == "dispatch":
            asked[event.data["call"]] = event.data
        elif event.kind == "result" and (call := asked.get(event.data["call"])) is not None:
            outcome = outcome_of(event.data)
            value = outcome.value if isinstance(outcome, Success) else outcome.message
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            failed = not isinstance(outcome, Success)
            found.append(ToolResult(tool=call["tool"], arguments=call["arguments"], result=text, failed=failed))
    return found[:MAX_TOOL_RESULTS]


def context_of(events: Sequence[RunEvent], cards: dict[str, ToolCard], *, model: str, reward: float = 0.0) -> Context:
    """The run as memory keeps it: opening, actions and tool results.

    Args:
        cards: the tools that the run could call.
        model: hash or name of the weights that decided.

    Raises:
        RunError: as `episode_of`.
        RecordError: the run is void, or too long to be remembered.
    """
    episode = episode_of(events, reward)
    request = msgspec.convert(events[0].data["request"], RunRequest)
    opening = messages(View(task=request.task, cards=cards), "brief")
    notes = events[0].data.get("notes", {}).get("text", "")
    recalled = [notes] if notes else []
    return pack(episode, opening, model=model, config="", tool_results=tool_results(events), recalled=recalled)
