"""Tool use as an environment: questions that tools answer, decisions as actions, results as observations.

    [envs.tools]
    type = "shoal.agents.environment:ToolUse"

`arithmetic`: products and sums too large to do in one's head; `lookup`: prices that only a tool knows; `documents`:
lengths that stand in a text. An action is a decision in the brief form (`scheduler.decision`), drawn under a grammar
made from the tools' cards; calls of one action are performed in their order. The tools are functions of the task, so
an episode can be played again anywhere.

With `constrain = "seen"` numbers and words in an action, the answer's too, are only such as the question or a result
contains: a small model then begins with a choice among what it read, and learns which.

Reward: 1 for the right number as the answer. `tool_reward` of it is earned already by the first call whose result the
answer is made of, so that an untrained model has something to learn from.

Invariants: the splits share no question; an episode depends on its task and its actions alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import structs
from pydantic import Field

from shoal.agents.scheduler.decision import BRIEF_CALLS, decision_schema, parse
from shoal.agents.scheduler.policy import View
from shoal.agents.scheduler.prompt import messages, result_line
from shoal.agents.tools.card import ToolCard, Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.outcome import Outcome, Success, failure
from shoal.agents.tools.schema import Schema
from shoal.envs.base import (
    Environment,
    EnvironmentSettings,
    Observation,
    Split,
    Step,
    check_cursor,
    stable_fraction,
    stable_int,
)
from shoal.envs.extract import last_number
from shoal.errors import TaskError
from shoal.protocol.episode import Task
from shoal.protocol.sampling import Grammar

Kind = Literal["arithmetic", "lookup", "documents"]

GOODS = ("apple", "book", "candle", "drum", "fork", "glove", "hat", "jar", "kite", "lamp", "mirror", "needle")
RIVERS = ("Arle", "Brun", "Cael", "Dorn", "Esk", "Faro", "Glim", "Hest", "Inne", "Jura", "Kolm", "Lauter")

HELDOUT_SHARE = 0.2
MAX_DRAWS = 1000

UNKNOWN = "unknown"
"""The answer of an agent that has read no number."""

_NUMBER = re.compile(r"(?<![\w.])-?\d{1,15}")
"""Not the 1 of `c1`, which names a call."""

_ID = re.compile(r"(arithmetic|lookup|documents)-(\d{1,20})")


class ToolUseSettings(EnvironmentSettings):
    """Which questions, and how they are rewarded."""

    kinds: tuple[Kind, ...] = Field(default=("arithmetic", "lookup", "documents"), min_length=1)
    """Kinds of questions, in turn."""
    max_turns: int = Field(default=4, ge=2, le=16)
    """Actions of an episode; the last one can only be an answer."""
    tool_reward: float = Field(default=0.2, ge=0, lt=1)
    """Part of the reward that the first useful call earns."""
    constrain: Literal["form", "seen"] = "form"
    """`form`: a decision that the tools' cards allow; `seen`: besides, only numbers and words that were read."""


@dataclass(frozen=True)
class Question:
    """One question, with the tools that answer it."""

    text: str
    answer: int
    steps: frozenset[int | str]
    """What useful calls give."""
    tools: Callable[[], Sequence[FunctionTool]]
    """Made for an episode only: a question may be drawn and thrown away."""


class ToolUse(Environment):
    """Questions answered by calling tools."""

    Settings: ClassVar[type[EnvironmentSettings]] = ToolUseSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        kinds: tuple[Kind, ...] = self.settings.kinds
        return self._drawn(kinds[index % len(kinds)], split, index, seed)

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        found = _ID.fullmatch(task_id)
        return self._drawn(found[1], "train", index, seed) if found else self.task("train", index, seed)  # type: ignore[arg-type]

    def _drawn(self, kind: Kind, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        for attempt in range(MAX_DRAWS):
            number = stable_int(split, index, seed, attempt) % 10**18
            held = stable_fraction("heldout", question(kind, number).text) < HELDOUT_SHARE
            if held == (split == "heldout"):
                return Task(env=self.name, id=f"{kind}-{number}", seed=0)
        raise TaskError(f"no {split} question of the kind {kind} was found.")

    def question(self, task: Task) -> Question:
        """What a task asks; raises `TaskError` where it is not this environment's."""
        found = _ID.fullmatch(task.id)
        if found is None:
            raise TaskError(f"no such task: {task.id[:100]!r}.")
        return question(found[1], int(found[2]))  # type: ignore[arg-type]

    def answers(self, task: Task) -> tuple[str, ...]:
        return (str(self.question(task).answer),)

    async def reset(self, task: Task) -> Observation:
        self._question = self.question(task)
        self._tools = {tool.card.name: tool for tool in self._question.tools()}
        self._cards = {name: tool.card for name, tool in self._tools.items()}
        self._schemas = {name: Schema(card.parameters, name) for name, card in self._cards.items()}
        self._turns = self._calls = 0
        self._useful = False
        self._seen = [self._question.text]
        said = messages(View(task=self._question.text, cards=self._cards), "brief")
        return Observation(tuple(said), self._grammar())

    def also_read(self, notes: str) -> Grammar | None:
        self._seen.append(notes)
        return self._grammar()

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        self._turns += 1
        decision, problem = parse(action)
        if decision is not None and decision.answer is not None:
            return self._ended(last_number(decision.answer) == self._question.answer)
        if self._turns >= self.settings.max_turns:
            return self._ended(False)
        if decision is None or not decision.calls:
            words = problem or "it has neither calls nor an answer"
            return Step(f"That could not be used: {words}.", 0.0, False, self._info(0.0), self._grammar())
        lines: list[str] = []
        reward = 0.0
        for call in decision.calls[:BRIEF_CALLS]:
            self._calls += 1
            outcome = await self._perform(call.tool, call.arguments)
            lines.append(result_line(f"c{self._calls}", call.tool, outcome))
            if isinstance(outcome, Success) and outcome.value in self._question.steps and not self._useful:
                self._useful = True
                reward = self.settings.tool_reward
        self._seen += lines
        return Step("\n".join(lines), reward, False, self._info(0.0), self._grammar())

    async def _perform(self, name: str, arguments: dict[str, object]) -> Outcome:
        if name not in self._cards:
            return failure("denied", f"there is no tool {name[:50]!r}")
        if problem := self._schemas[name].problem(arguments):
            return failure("arguments", problem)
        return await self._tools[name].call(arguments, lambda _: None)

    def _ended(self, right: bool) -> Step:
        earned = self.settings.tool_reward if self._useful else 0.0
        return Step("", 1.0 - earned if right else 0.0, True, self._info(float(right)))

    def _info(self, right: float) -> dict[str, float]:
        return {"strict": right, "called": float(self._calls > 0), "useful": float(self._useful)}

    def _grammar(self) -> Grammar:
        """What the next action must match: on the last turn an answer."""
        last = self._turns >= self.settings.max_turns - 1
        if self.settings.constrain == "form":
            schema = decision_schema(self._cards, "brief", must_answer=last)
        else:
            schema = seen_schema(self._cards, self._seen, must_answer=last)
        return Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())


def seen_schema(cards: Mapping[str, ToolCard], texts: Sequence[str], *, must_answer: bool) -> dict[str, Any]:
    """A decision whose numbers and words stand in `texts`, the question first; an answer is a number."""
    read = "\n".join(texts)
    numbers = list(dict.fromkeys(int(digits) for digits in _NUMBER.findall(read)))
    words = list(dict.fromkeys(re.findall(r"[A-Za-z]{3,20}", texts[0])))
    allowed = {"integer": {"type": "integer", "enum": numbers}, "string": {"type": "string", "enum": words}}
    narrowed = {}
    for name, card in cards.items():
        wanted = {key: allowed.get(schema.get("type"), schema) for key, schema in card.parameters["properties"].items()}
        if all(schema.get("enum", True) for schema in wanted.values()):
            narrowed[name] = structs.replace(card, parameters={**card.parameters, "properties": wanted})
    answer = {"type": "string", "enum": [str(number) for number in numbers] or [UNKNOWN]}
    return decision_schema(narrowed, "brief", must_answer=must_answer, answer=answer)


def question(kind: Kind, number: int) -> Question:
    """The question `number` of a kind; the same wherever it is asked for."""
    return _MAKERS[kind](Random(number))


def multiply(x: int, y: int) -> int:
    """x times y."""
    return _bounded(x * y)


def add(x: int, y: int) -> int:
    """x plus y."""
    return _bounded(x + y)


def subtract(x: int, y: int) -> int:
    """x minus y."""
    return _bounded(x - y)


def _bounded(value: int) -> int:
    if abs(value) >= 10**15:
        raise ToolError("the result is too large")
    return value


def _tool(function: Callable[..., object]) -> FunctionTool:
    return FunctionTool(function, Use(idempotent=True))


ARITHMETIC = tuple(_tool(function) for function in (multiply, add, subtract))


def _arithmetic(draw: Random) -> Question:
    a, b, c = (draw.randint(11, 99) for _ in range(3))
    if draw.random() < 0.5:
        return Question(f"What is {a} * {b}?", a * b, frozenset({a * b}), lambda: ARITHMETIC)
    return Question(f"What is {a} * {b} + {c}?", a * b + c, frozenset({a * b, a * b + c}), lambda: ARITHMETIC)


def _lookup(draw: Random) -> Question:
    prices = dict(zip(draw.sample(GOODS, 6), (draw.randint(2, 99) for _ in range(6)), strict=True))

    def price(item: str) -> int:
        """The price of an item, in euros."""
        if item not in prices:
            raise ToolError(f"there is no price of {item[:50]!r}")
        return prices[item]

    first, second = draw.sample(sorted(prices), 2)

    def tools() -> Sequence[FunctionTool]:
        return (_tool(price), *ARITHMETIC)

    if draw.random() < 0.5:
        return Question(f"What does one {first} cost?", prices[first], frozenset({prices[first]}), tools)
    both = prices[first] + prices[second]
    text = f"What do one {first} and one {second} cost together?"
    return Question(text, both, frozenset({prices[first], prices[second], both}), tools)


def _documents(draw: Random) -> Question:
    first, second = draw.sample(RIVERS, 2)
    lengths = {first: draw.randint(100, 900), second: draw.randint(100, 900)}
    texts = {
        river: f"The {river} rises in the hills. It is {length} km long and flows into the sea."
        for river, length in lengths.items()
    }

    def read(document: str) -> str:
        """The text of a document, named after a river."""
        if document not in texts:
            raise ToolError(f"there is no document {document[:50]!r}; there are: {', '.join(texts)}")
        return texts[document]

    def tools() -> Sequence[FunctionTool]:
        return (_tool(read), *ARITHMETIC)

    if draw.random() < 0.5:
        return Question(f"How many km long is the {first}?", lengths[first], frozenset({texts[first]}), tools)
    both = lengths[first] + lengths[second]
    text = f"How many km long are the {first} and the {second} together?"
    return Question(text, both, frozenset({both, *texts.values()}), tools)


_MAKERS: dict[Kind, Callable[[Random], Question]] = {
    "arithmetic": _arithmetic,
    "lookup": _lookup,
    "documents": _documents,
}
