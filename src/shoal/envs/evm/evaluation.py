"""A model does one quest, and everything of it is kept: what was said, what was done, and what it was worth.

    opening ─▶ speaker ─▶ reply ─▶ acts (typed, or run by a script) ─▶ Quest.act ─▶ feedback ─┐
                  ▲                                                                           │
                  └───────────────────────────────────────────────────────────────────────────┘

The quest, its limits and its judge are those of the environment (`quest`, `judging`); what is here is how a model is
asked and what is remembered.

Invariants: `instance(id, round, seed)` is pure, and its instances are held out from training; a `Played` is complete
and judged; whatever happens, the chain is left as it was found.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.envs.base import stable_int
from shoal.envs.evm.actions import Action, ActionError, Found, Report, Submit, read_action, write_action
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.decoded import asked_words, call_words, event_words, holdings
from shoal.envs.evm.definition import Definition
from shoal.envs.evm.environment import ADDRESS
from shoal.envs.evm.grammar import action_grammar
from shoal.envs.evm.prompts import Acting, opening
from shoal.envs.evm.quest import Feedback, Quest
from shoal.envs.evm.sampling import Instance, sample
from shoal.envs.evm.scripts import ScriptRunner, find_script
from shoal.envs.evm.speakers import ContextFull, Reply, Speaker
from shoal.errors import RecordError
from shoal.protocol.chat import Message
from shoal.protocol.codec import Record

Mode = Literal["multi", "naive"]
Constrain = Literal["no", "form", "seen"]
Ending = Literal["acted", "submitted", "gave up", "out of rounds", "out of attempts", "out of context"]

MAX_ACTS = 64
"""Of one reply."""


class Act(Record, frozen=True):
    """One thing done, as people read it."""

    wrote: str
    """The action as JSON, or what a script came to; empty where there was none to read."""
    call: str = ""
    """The transaction that was sent."""
    success: bool | None = None
    """Of the transaction."""
    block: int = 0
    reason: str = ""
    """Why it reverted."""
    events: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    """Reads of the chain that count as queries."""
    feedback: str = ""
    """What the agent read of it."""
    understood: bool = True


class Turn(Record, frozen=True):
    """One answer of the model."""

    messages: tuple[Message, ...]
    """What it read since its last one."""
    reply: str
    finish: str
    acts: tuple[Act, ...]
    prompt_tokens: int
    tokens: int
    seconds: float
    """Until the model's answer was there; it may have waited for others' first."""


class Check(Record, frozen=True):
    """One check of the judge."""

    name: str
    that: str
    points: int
    passed: bool


class Played(Record, frozen=True):
    """One quest, done and judged."""

    task: str
    group: str
    composite: bool
    round: int
    seed: int
    instruction: str
    turns: tuple[Turn, ...]
    checks: tuple[Check, ...]
    holdings: dict[str, tuple[str, str]]
    """What changed of what the agent holds: before and after, base units, decimal."""
    ending: Ending
    points: int
    steps: int
    optimal_steps: int
    strict: float
    paper: float
    seconds: float
    started_at: float

    def check(self) -> None:
        if not all(math.isfinite(x) and 0 <= x <= 100 for x in (self.strict, self.paper)):
            raise RecordError(f"a score of {self.task} is not between 0 and 100.")
        if self.round < 0:
            raise RecordError(f"a round of {self.task} is negative.")
        if any(not number.isdecimal() or len(number) > 80 for pair in self.holdings.values() for number in pair):
            raise RecordError(f"a holding of {self.task} is no number.")

    @property
    def key(self) -> tuple[str, int]:
        """Which of an evaluation's episodes this is."""
        return self.task, self.round

    @property
    def tokens(self) -> int:
        return sum(turn.tokens for turn in self.turns)


@dataclass(frozen=True)
class Manner:
    """How the model is asked."""

    acting: Acting
    mode: Mode = "multi"
    brief: bool = False
    constrain: Constrain = "no"
    """What a grammar keeps typed actions to, as in the environment."""
    runner: ScriptRunner | None = None
    """Runs scripts."""


def instance(definition: Definition, round_: int, seed: int) -> Instance:
    """The instance of a round; the last bit of its seed keeps it out of training (`environment`)."""
    return sample(definition, (stable_int("evm eval", seed, definition.id, round_) >> 2) * 2 + 1)


async def play(wanted: Instance, round_: int, speaker: Speaker, manner: Manner, chain: ChainBackend) -> Played:
    """Do one quest on a chain that stands at the genesis.

    Raises:
        ShoalError: the model, the sandbox or the chain failed: nothing was judged.
    """
    quest = Quest(wanted, chain)
    started_at, started = time.time(), time.monotonic()
    try:
        quest.begin()
        before = holdings(chain, quest.values)
        turns, ending = await _converse(quest, speaker, manner, round_)
        verdict = quest.verdict()
        after = holdings(chain, quest.values)
    finally:
        quest.end()
    definition = wanted.definition
    return Played(
        task=definition.id,
        group=definition.group,
        composite=definition.composite,
        round=round_,
        seed=wanted.seed,
        instruction=wanted.instruction,
        turns=tuple(turns),
        checks=tuple(
            Check(name=name, that=that, points=points, passed=verdict.passed[name])
            for name, (points, that) in definition.checks.items()
        ),
        holdings={name: (str(was), str(after[name])) for name, was in before.items() if was != after.get(name, was)},
        ending=ending,
        points=verdict.points,
        steps=verdict.steps,
        optimal_steps=definition.optimal_steps,
        strict=verdict.strict,
        paper=verdict.paper,
        seconds=time.monotonic() - started,
        started_at=started_at,
    )


async def _converse(quest: Quest, speaker: Speaker, manner: Manner, round_: int) -> tuple[list[Turn], Ending]:
    definition = quest.instance.definition
    one_shot = manner.mode == "naive"
    new = opening(quest, manner.acting, style="brief" if manner.brief else "full", one_shot=one_shot)
    said: list[Message] = []
    turns: list[Turn] = []
    seen: frozenset[str] = frozenset()
    while True:
        said += new
        seen |= {address for message in new for address in ADDRESS.findall(message.content)}
        grammar = None
        if manner.constrain != "no":
            grammar = action_grammar(definition.composite, seen if manner.constrain == "seen" else None)
        seed = stable_int("evm eval", definition.id, round_, quest.instance.seed, len(turns))
        try:
            reply = await speaker.reply(said, seed=seed, grammar=grammar)
        except ContextFull:
            if not turns:
                raise
            return turns, "out of context"
        acts: list[Act] = []
        ending: Ending | None = None
        async for action in _actions(quest, reply, manner, one_shot=one_shot and definition.composite):
            act, feedback = _do(quest, action)
            acts.append(act)
            if feedback.done:
                ending = _ending(quest, action)
                break
        turns.append(
            Turn(
                messages=tuple(new),
                reply=reply.text,
                finish=reply.finish,
                acts=tuple(acts),
                prompt_tokens=reply.prompt_tokens,
                tokens=reply.tokens,
                seconds=reply.seconds,
            )
        )
        if ending is not None or one_shot:
            return turns, ending or "acted"
        said.append(Message(role="assistant", content=reply.text))
        left = quest.max_rounds - quest.rounds
        new = (Message(role="user", content=f"{acts[-1].feedback}\n{left} rounds left."),)


def _ending(quest: Quest, action: Action | Found | ActionError) -> Ending:
    if isinstance(action, Submit):
        return "submitted"
    if isinstance(action, Report):
        return "gave up"
    if not quest.instance.definition.composite:
        return "acted"
    return "out of rounds" if quest.rounds >= quest.max_rounds else "out of attempts"


def _do(quest: Quest, action: Action | Found | ActionError) -> tuple[Act, Feedback]:
    """Carry out one act, and write down what it did."""
    record = quest.record
    num_sent, num_asked = len(record.receipts), len(record.asked)
    feedback = quest.act(action)
    wrote = ""
    if isinstance(action, Found):
        wrote = json.dumps(dict(action.answer), default=str)
    elif not isinstance(action, ActionError):
        wrote = write_action(action)
    asked = tuple(asked_words(query) for query in record.asked[num_asked:])
    understood = not isinstance(action, ActionError)
    if len(record.receipts) == num_sent:
        return Act(wrote=wrote, asked=asked, feedback=feedback.text, understood=understood), feedback
    receipt = record.receipts[-1]
    return (
        Act(
            wrote=wrote,
            call=call_words(receipt.transaction),
            success=receipt.success,
            block=receipt.block,
            reason=receipt.reason,
            events=tuple(event_words(log) for log in receipt.logs),
            asked=asked,
            feedback=feedback.text,
            understood=understood,
        ),
        feedback,
    )


async def _actions(
    quest: Quest, reply: Reply, manner: Manner, *, one_shot: bool
) -> AsyncIterator[Action | Found | ActionError]:
    """What a reply asks for, one after another: a script is run only once those before it have been carried out."""
    if manner.acting == "typed":
        for text in _objects(reply.text) if one_shot else [reply.text]:
            yield _typed(text)
        return
    assert manner.runner is not None, "scripts need a runner"
    blocks = re.findall(r"```.*?```", reply.text, re.DOTALL)[:MAX_ACTS] if one_shot else []
    for text in blocks or [reply.text]:
        try:
            script = find_script(text, manner.acting)
        except ActionError as error:
            # A workflow ends by words, not by a script.
            typed = _typed(text)
            yield typed if isinstance(typed, Submit | Report) else error
            continue
        yield await manner.runner.run(quest, script)


def _typed(text: str) -> Action | ActionError:
    try:
        return read_action(text)
    except ActionError as error:
        return error


def _objects(text: str) -> Sequence[str]:
    """The actions in a list of them, or one after another; each as its text."""
    decoder = json.JSONDecoder()
    found: list[str] = []
    at = min((place for place in (text.find("["), text.find("{")) if place >= 0), default=-1)
    while at >= 0 and len(found) < MAX_ACTS:
        try:
            value, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            break
        items: list[Any] = value if isinstance(value, list) else [value]
        found += [json.dumps(item) for item in items]
        at = text.find("{", at)
    return found[:MAX_ACTS] or [text]
