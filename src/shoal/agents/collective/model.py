"""Models as experts and as writers of chains: any `Sampler`, with a prompt of its own.

An expert's step is a one-turn conversation; what other steps gave is quoted as data. It is an episode as well, with the
tokens as they were drawn, so an expert can be trained on its own part of what the collective did, and a planner on its
chains (`episodes`).

Invariants: a chain is drawn under a grammar, so it parses; its requirements are skills that somebody was attested for,
where the ledger knows any; a step needs only steps before it; a single step that asks the problem itself is what is
left where a model cannot do better (`fallback`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from blake3 import blake3

from shoal.agents.collective.work import NoChain, Plan, PlannedStep, StepFailed, SubTask, Work
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError, ConfigError, ModelError
from shoal.memory.recall import Recall
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
        recall: what is remembered for a step's task, as a block to put before it.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    claims: Mapping[str, float] = field(default_factory=dict)
    instructions: str = ""
    params: SamplingParams = ACTING
    grammar: Grammar | None = None
    recall: Callable[[str], Recall] | None = None

    async def act(self, task: SubTask) -> Work:
        """Do a step; raises `StepFailed` where the model cannot."""
        began = time.time()
        said = [Message(role="system", content=self.instructions)] if self.instructions else []
        words = step_words(task)
        if self.recall is not None and (notes := self.recall(task.task).text):
            words = f"{notes}\n\n{words}"
        said.append(Message(role="user", content=words))
        try:
            prompt = self.tokenizer.prompt(said)
            request = SampleRequest(prompt_ids=tuple(prompt), params=self.params, grammar=self.grammar)
            completion = await _sampled(self.sampler, request)
        except (CapacityError, ConfigError, ModelError) as error:
            raise StepFailed(f"the model does not do it: {error.problem}") from None
        data = {"requirement": task.requirement, "shown": said[-1].content, "instructions": self.instructions}
        if self.grammar is not None:
            data["grammar"] = msgspec.to_builtins(self.grammar)
        shown = said[-1].content
        turn = Turn(context_ids=tuple(prompt), observation=shown, completion=completion, grammar=self.grammar)
        episode = _episode(turn, data, self.params.temperature, began)
        return Work(completion.text.strip(), tokens=len(prompt) + len(completion.token_ids), episode=episode)


async def _sampled(sampler: Sampler, request: SampleRequest) -> Completion:
    """A completion that its model ended; one that broke off is nobody's word."""
    completion = await sampler.sample(request)
    if completion.finish in ("cancelled", "error"):
        raise ModelError("its answer broke off.")
    return completion


def _episode(turn: Turn, data: dict[str, Any], temperature: float, began: float) -> Episode:
    """One turn as an episode; those with the same words are compared with each other."""
    words = msgspec.json.encode([data.get("instructions", ""), data["shown"]])
    name = blake3(words).hexdigest(16)
    return Episode(
        id=secrets.token_hex(8),
        group=name,
        index=0,
        task=Task(env=ENVIRONMENT, id=name, seed=0, data=data),
        turns=(turn,),
        outcome="done",
        temperature=temperature,
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

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        """A chain for a problem; raises `NoChain` where the model writes none."""
        began = time.time()
        said = [
            Message(role="system", content=WRITING.format(steps=STEPS) + known(skills)),
            Message(role="user", content=problem),
        ]
        grammar = Grammar(kind="json_schema", text=msgspec.json.encode(chain_schema(skills)).decode())
        try:
            prompt = tuple(self.tokenizer.prompt(said))
            request = SampleRequest(prompt_ids=prompt, params=self.params, grammar=grammar)
            completion = await _sampled(self.sampler, request)
        except (CapacityError, ConfigError, ModelError) as error:
            raise NoChain(f"the model writes no chain: {error.problem}") from None
        tokens = len(prompt) + len(completion.token_ids)
        turn = Turn(context_ids=prompt, observation=problem, completion=completion, grammar=grammar)
        data = {"shown": problem, "instructions": said[0].content, "grammar": msgspec.to_builtins(grammar)}
        episode = _episode(turn, data, self.params.temperature, began)
        try:
            return Plan(read_chain(completion.text), tokens, episode)
        except NoChain:
            if not self.fallback:
                raise
            return Plan([PlannedStep(self.fallback, problem)], tokens, episode, as_asked=False)


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
