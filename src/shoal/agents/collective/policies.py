"""Experts that decide as `agents.scheduler` does: hosted models, and agents with tools.

`PolicyExpert` asks a policy (an OpenAI-compatible endpoint, say) for an answer and nothing else; `PolicyWriter` has it
write chains; `RunsExpert` does a step as a whole run of the scheduler, with the tools that it has.

Invariants: what other steps gave reaches all of them as quoted data; a run ends with the step that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.agents.collective.model import STEPS, WRITING, known, read_chain, step_words
from shoal.agents.collective.work import NoChain, Plan, PlannedStep, StepFailed, SubTask, Work
from shoal.agents.scheduler.episodes import episode_of
from shoal.agents.scheduler.policy import Decided, Policy, PolicyError, View
from shoal.agents.scheduler.records import Budget, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.errors import CapacityError, RunError
from shoal.protocol.episode import Episode

ONLY_ANSWER = "there are no tools here"

STEP_BUDGET = Budget(steps=8, calls=32, tokens=50_000, seconds=120.0)
"""Of one step done with tools."""


@dataclass(frozen=True)
class PolicyExpert:
    """Does steps by asking a policy for an answer."""

    policy: Policy
    claims: Mapping[str, float] = field(default_factory=dict)
    instructions: str = ""

    async def act(self, task: SubTask) -> Work:
        """Do a step; raises `StepFailed` where the policy gives no answer."""
        words = "\n".join(filter(None, (self.instructions, step_words(task))))
        try:
            decided = await self.policy.decide(View(task=words, cards={}, must_answer=ONLY_ANSWER))
        except PolicyError as error:
            raise StepFailed(f"the model does not do it: {error.problem}") from None
        return Work(_answer(decided), tokens=_tokens(decided))


@dataclass(frozen=True)
class PolicyWriter:
    """Writes chains by asking a policy for them.

    Args:
        fallback: as `model.SamplerWriter` has it.
    """

    policy: Policy
    fallback: str = ""

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        """A chain for a problem; raises `NoChain` where the policy writes none."""
        words = f"{WRITING.format(steps=STEPS)}{known(skills)}\nThe problem: {problem}"
        try:
            decided = await self.policy.decide(View(task=words, cards={}, must_answer=ONLY_ANSWER))
        except PolicyError as error:
            raise NoChain(f"the model writes no chain: {error.problem}") from None
        try:
            return Plan(read_chain(_answer(decided)), _tokens(decided))
        except (NoChain, StepFailed) as error:
            if not self.fallback:
                raise NoChain(error.problem) from None
            return Plan([PlannedStep(self.fallback, problem)], _tokens(decided), as_asked=False)


@dataclass(frozen=True)
class RunsExpert:
    """Does steps as runs of the scheduler.

    Args:
        records: whether its model gives tokens, so that a run is an episode.
    """

    runs: Runs
    claims: Mapping[str, float] = field(default_factory=dict)
    instructions: str = ""
    records: bool = False

    async def act(self, task: SubTask) -> Work:
        """Do a step; raises `StepFailed` where the run does not end with an answer."""
        words = "\n".join(filter(None, (self.instructions, step_words(task))))
        try:
            name = self.runs.start(RunRequest(task=words, budget=STEP_BUDGET, record=self.records))
        except (CapacityError, RunError) as error:
            raise StepFailed(f"it is not begun: {error.problem}") from None
        try:
            last = await self.runs.ended(name)
        finally:
            self.runs.cancel(name)
        if last.kind != "final":
            raise StepFailed(f"it was not done: {last.data.get('message', 'the run ended without an answer')}")
        return Work(str(last.data["answer"]).strip(), self.runs.state(name).tokens, self._episode(name))

    def _episode(self, name: str) -> Episode | None:
        return episode_of(list(self.runs.log.events(name))) if self.records else None


def _answer(decided: Decided) -> str:
    if decided.decision is None or not decided.decision.answer:
        raise StepFailed(f"the model gives no answer: {decided.problem or 'it is empty'}.")
    return decided.decision.answer.strip()


def _tokens(decided: Decided) -> int:
    return decided.spent.tokens_in + decided.spent.tokens_out
