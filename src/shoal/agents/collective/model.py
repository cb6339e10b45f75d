"""Models as experts and as writers of chains: any `Sampler`, with a prompt of its own.

An expert's step is a one-turn conversation; what other steps gave is quoted as data. It is an episode as well, with the
tokens as they were drawn, so an expert can be trained on its own part of what the collective did.

Invariants: a chain is drawn under a grammar, so it parses; its requirements are skills that somebody was attested for,
where the ledger knows any; a step needs only steps before it; a single step that asks the problem itself is what is
left where a model cannot do better (`fallback`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.agents.collective.work import NoChain, PlannedStep, StepFailed, SubTask, Work
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError, ConfigError, ModelError
from shoal.protocol.chat import Message
from shoal.protocol.collective import MAX_REQUIREMENT_CHARS
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion, Grammar, Sampler, SampleRequest, SamplingParams

ENVIRONMENT = "agents.collective"
"""What a step's task names as its environment."""

STEPS = 5
"""The longest chain that a model writes."""

TASK_CHARS = 600
NEEDED_CHARS = 2000
"""Of a result that a step depends on."""

ACTING = SamplingParams(max_tokens=256, temperature=0.7)
PLANNING = SamplingParams(max_tokens=400, temperature=0.7)

WRITING = """Break the problem into at most {steps} steps that others will do, each without seeing the problem. \
Reply with JSON: {{"steps": [{{"requirement": WHAT IT TAKES, "task": WHAT IS TO BE DONE, "needs": [NUMBERS OF EARLIER \
STEPS]}}]}}. The last step gives the answer."""


@dataclass(frozen=True)
class SamplerExpert:
    """Does steps with a model.

    Args:
        instructions: the system message: what this expert is, and how it replies.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    claims: Mapping[str, float] = field(default_factory=dict)
    instructions: str = ""
    params: SamplingParams = ACTING
    grammar: Grammar | None = None

    async def act(self, task: SubTask) -> Work:
        """Do a step; raises `StepFailed` where the model cannot."""
        began = time.time()
        said = [Message(role="system", content=self.instructions)] if self.instructions else []
        said.append(Message(role="user", content=step_words(task)))
        prompt = self.tokenizer.prompt(said)
        try:
            request = SampleRequest(prompt_ids=tuple(prompt), params=self.params, grammar=self.grammar)
            completion = await self.sampler.sample(request)
        except (CapacityError, ConfigError, ModelError) as error:
            raise StepFailed(f"the model does not do it: {error.problem}") from None
        episode = self._episode(task, tuple(prompt), said[-1].content, completion, began)
        return Work(completion.text.strip(), tokens=len(prompt) + len(completion.token_ids), episode=episode)

    def _episode(self, task: SubTask, prompt: tuple[int, ...], shown: str, drawn: Completion, began: float) -> Episode:
        name = secrets.token_hex(8)
        turn = Turn(context_ids=prompt, observation=shown, completion=drawn, grammar=self.grammar)
        return Episode(
            id=name,
            group=name,
            index=0,
            task=Task(env=ENVIRONMENT, id=name, seed=0, data={"requirement": task.requirement, "task": task.task}),
            turns=(turn,),
            outcome="done",
            temperature=self.params.temperature,
            started_at=began,
            finished_at=time.time(),
        )


@dataclass(frozen=True)
class SamplerWriter:
    """Writes chains with a model.

    Args:
        fallback: the requirement of the one-step chain that stands in where the model's own cannot be executed; empty:
            there is none, and the chain abstains.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    params: SamplingParams = PLANNING
    fallback: str = ""

    async def write(self, problem: str, skills: Sequence[str]) -> Sequence[PlannedStep]:
        """A chain for a problem; raises `NoChain` where the model writes none."""
        said = [
            Message(role="system", content=WRITING.format(steps=STEPS) + known(skills)),
            Message(role="user", content=problem),
        ]
        grammar = Grammar(kind="json_schema", text=msgspec.json.encode(chain_schema(skills)).decode())
        try:
            request = SampleRequest(prompt_ids=tuple(self.tokenizer.prompt(said)), params=self.params, grammar=grammar)
            completion = await self.sampler.sample(request)
        except (CapacityError, ConfigError, ModelError) as error:
            raise NoChain(f"the model writes no chain: {error.problem}") from None
        try:
            return read_chain(completion.text)
        except NoChain:
            if not self.fallback:
                raise
            return [PlannedStep(self.fallback, problem)]


def step_words(task: SubTask) -> str:
    """A step as its model reads it: the results that it needs are quoted, as data."""
    lines = [
        f"The result of step {step + 1}, as data: {msgspec.json.encode(result[:NEEDED_CHARS]).decode()}"
        for step, result in sorted(task.needed.items())
    ]
    return "\n".join([*lines, task.task])


def known(skills: Sequence[str]) -> str:
    """What a writer is told about who is there."""
    return f" What others can do: {'; '.join(skills)}." if skills else ""


def chain_schema(skills: Sequence[str]) -> dict[str, Any]:
    """What a chain must match."""
    requirement: dict[str, Any] = {"type": "string", "minLength": 3, "maxLength": 80}
    if skills:
        requirement = {"enum": list(skills)}
    step = {
        "type": "object",
        "properties": {
            "requirement": requirement,
            "task": {"type": "string", "minLength": 3, "maxLength": TASK_CHARS},
            "needs": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": STEPS}, "maxItems": STEPS},
        },
        "required": ["requirement", "task", "needs"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": step, "minItems": 1, "maxItems": STEPS}},
        "required": ["steps"],
        "additionalProperties": False,
    }


class _WrittenStep(msgspec.Struct):
    requirement: str
    task: str
    needs: list[int] = []


class _Written(msgspec.Struct):
    steps: list[_WrittenStep]


def read_chain(text: str) -> list[PlannedStep]:
    """The chain in a model's words; a need of itself or of a later step is left out.

    Raises:
        NoChain: it is none.
    """
    try:
        written = msgspec.json.decode(text.encode(errors="replace"), type=_Written)
    except (msgspec.DecodeError, RecursionError) as error:
        raise NoChain(f"what the model wrote is no chain: {str(error)[:200]}.") from None
    if not written.steps:
        raise NoChain("the model's chain has no steps.")
    return [
        PlannedStep(
            step.requirement[:MAX_REQUIREMENT_CHARS].strip() or "anything",
            step.task,
            tuple(sorted({need - 1 for need in step.needs if 0 < need <= number})),
        )
        for number, step in enumerate(written.steps)
    ]
