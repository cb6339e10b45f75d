"""An agent as a tool: a task in, an answer out, so that other agents can have work done without doing it.

Invariants: each call is a run of its own, with the budget that the agent's owner set and nobody else's; a call that is
cancelled, or whose caller is gone, ends its run; what needs approval is refused, because nobody is there to ask.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel, TypeAdapter

from shoal.agents.scheduler.records import MAX_TASK_CHARS, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import ToolCard, Use
from shoal.agents.tools.function import Progress, without_titles
from shoal.agents.tools.outcome import Outcome, failure, success
from shoal.errors import CapacityError, ShoalError

TOLD = ("thought", "dispatch", "result", "retry", "replan")
"""Events that are signs of life."""


class Done(BaseModel):
    """What an agent did."""

    answer: str
    run: str
    steps: int
    calls: int
    tokens: int
    usd: float


class AgentTool:
    """Runs behind a card.

    Args:
        runs: where the agent's runs are worked on; made with `approval_timeout_s=0`, they refuse what needs approval.
        request: what each run may use and spend; its task is replaced.
    """

    def __init__(self, runs: Runs, name: str, description: str, request: RunRequest, use: Use | None = None) -> None:
        self._runs, self._request = runs, request
        task = {"type": "string", "minLength": 1, "maxLength": MAX_TASK_CHARS, "description": "what to do, in words"}
        self.card = ToolCard(
            name=name,
            description=description,
            parameters={
                "type": "object",
                "properties": {"task": task},
                "required": ["task"],
                "additionalProperties": False,
            },
            output=without_titles(TypeAdapter(Done).json_schema(mode="serialization")),
            use=use or Use(max_concurrency=4, timeout_s=600),
        )
        self.card.check()

    async def call(self, arguments: dict[str, Any], progress: Progress) -> Outcome:
        """One task."""
        try:
            run = self._runs.start(msgspec.structs.replace(self._request, task=arguments["task"]))
        except CapacityError as error:
            return failure("error", str(error), retryable=True)
        except ShoalError as error:
            return failure("error", str(error))
        try:
            async for event in self._runs.follow(run):
                if event.kind in TOLD:
                    progress(f"{event.kind} {event.seq}")
            last = await self._runs.ended(run)
        finally:
            self._runs.cancel(run)
        if last.kind == "error":
            return failure("error", f"{last.data.get('reason')}: {last.data.get('message')}")
        state = self._runs.state(run)
        done = Done(
            answer=last.data["answer"],
            run=run,
            steps=len(state.steps),
            calls=state.attempts,
            tokens=state.tokens,
            usd=state.usd,
        )
        return success(done.model_dump())
