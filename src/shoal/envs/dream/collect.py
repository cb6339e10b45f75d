"""Real episodes, page by page: what a world model learns from, and what an agent can imitate.

Each episode is one record: its pages as they were read, the acts between them, and what it earned. Two pages in a row
are a transition; the last act has none where it ended the episode.

Invariants: an episode depends on its task, its policy and its seed; one that the browser spoilt raises, and is not a
record.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from shoal.envs.base import Split, stable_int
from shoal.envs.web.actions import (
    LIST_ROLES,
    TEXT_ROLES,
    Action,
    Click,
    GoBack,
    Scroll,
    Select,
    Stop,
    Type,
    options_of,
    write_action,
)
from shoal.envs.web.environment import Web
from shoal.envs.web.tree import Page
from shoal.errors import RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.codec import Record
from shoal.protocol.episode import Task
from shoal.protocol.sampling import Grammar

PolicyName = Literal["reference", "random", "model"]

MAX_MOMENTS = 1000
STOP_SHARE, BACK_SHARE = 0.03, 0.05
"""How often the random policy stops, and goes back."""
IDLE_SHARE = 0.1
"""How often it acts on any element at all, such as a heading, and not on one that is there to be acted on."""
ACTIVE_ROLES = frozenset({"link", "button", "checkbox", "radio", "tab", "menuitem", *TEXT_ROLES, *LIST_ROLES})
NAMES = re.compile(r"(?:[A-Z]\w*|\d+)(?: (?:[A-Z]\w*|\d+))*")
"""What an instruction calls by name: runs of capitalised words and numbers."""


class Moment(Record, frozen=True):
    """A page, and what was done on it."""

    page: Page
    action: str
    """As it was written, whether or not it made sense."""
    shown: str
    """What the agent saw of the page, with the remark about its last act."""


class Collected(Record, frozen=True):
    """One episode."""

    id: str
    task: Task
    split: Split
    policy: str
    instruction: str
    opening: str
    """The first message, rules and first page included."""
    moments: tuple[Moment, ...]
    reward: float
    invalid: int
    """Acts that could not be done."""

    def check(self) -> None:
        self.task.check()
        if not 1 <= len(self.moments) <= MAX_MOMENTS or not 0 <= self.reward <= 1:
            raise RecordError(f"a collected episode has {len(self.moments)} moments and reward {self.reward}.")
        for moment in self.moments:
            moment.page.check()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The episode as the conversation that an agent had."""
        said = [{"role": "user", "content": self.opening}]
        for number, moment in enumerate(self.moments):
            if number:
                said.append({"role": "user", "content": moment.shown})
            said.append({"role": "assistant", "content": moment.action})
        return said


@dataclass(frozen=True, slots=True)
class Transition:
    """One act on one page, and the page after it."""

    instruction: str
    before: Page
    action: str
    after: Page


def transitions(episode: Collected) -> Iterator[Transition]:
    """The transitions of an episode, in order; scrolling and acts that could not be done leave the page as it was."""
    for moment, following in zip(episode.moments, episode.moments[1:], strict=False):
        yield Transition(episode.instruction, moment.page, moment.action, following.page)


Actor = Callable[[list[Message], Grammar | None], Awaitable[str]]
"""A model: the conversation so far, and what the reply must match, to the reply."""


async def play(
    env: Web, task: Task, split: Split, policy: PolicyName, seed: int, actor: Actor | None = None
) -> Collected:
    """One episode of `task`.

    Args:
        seed: of the random policy.
        actor: what acts with the policy `model`.

    Raises:
        TaskError: there is no reference policy for this task.
        BrowserError: the browser failed.
    """
    opening = await env.reset(task)
    try:
        chooser = _Chooser(env, policy, seed, actor)
        instruction, messages, grammar = env.play.instruction, list(opening.messages), opening.grammar
        shown, moments = messages[-1].content, []
        while True:
            page = env.play.page
            action = await chooser.choose(messages, grammar)
            moments.append(Moment(page=page, action=action, shown=shown))
            step = await env.step(action)
            if step.done:
                break
            shown, grammar = step.observation, step.grammar
            messages += [Message(role="assistant", content=action), Message(role="user", content=shown)]
        return Collected(
            id=f"{task.id}/{policy}/{seed}",
            task=task,
            split=split,
            policy=policy,
            instruction=instruction,
            opening=opening.messages[-1].content,
            moments=tuple(moments),
            reward=step.reward,
            invalid=int(step.info["invalid_actions"]),
        )
    finally:
        await env.close()


class _Chooser:
    """What acts in one episode."""

    def __init__(self, env: Web, policy: PolicyName, seed: int, actor: Actor | None) -> None:
        self._env = env
        self._name = policy
        self._actor = actor
        self._rng = Random(stable_int("random policy", seed))
        self._reference = env.play.policy() if policy == "reference" else None
        self._begun = False
        if policy == "reference" and self._reference is None:
            raise TaskError(
                f"{env.play.kind} has no reference policy.", "Collect it with the random policy or a model."
            )

    async def choose(self, messages: list[Message], grammar: Grammar | None) -> str:
        if self._name == "model":
            assert self._actor is not None, "a model acts through its actor"
            return await self._actor(messages, grammar)
        return write_action(self._random() if self._reference is None else self._next(self._reference))

    def _next(self, reference: Any) -> Action:
        try:
            action: Action = reference.send(self._env.play.page) if self._begun else next(reference)
        except StopIteration:
            return Stop()
        self._begun = True
        return action

    def _random(self) -> Action:
        """Any act on any element that is shown, mostly on one to be acted on; words come from the instruction."""
        rng, window, page = self._rng, self._env.shown, self._env.play.page
        shown = set(window.ids)
        nodes = [node for node in page.root.walk() if node.id in shown]
        active = [node for node in nodes if node.role in ACTIVE_ROLES or "clickable" in node.states]
        drawn = rng.random()
        if drawn < STOP_SHARE or not nodes:
            return Stop()
        if drawn < STOP_SHARE + BACK_SHARE:
            return GoBack()
        if window.total > window.end - window.start and drawn > 1 - BACK_SHARE:
            return Scroll(rng.choice(("up", "down")))
        node = rng.choice(active if active and rng.random() >= IDLE_SHARE else nodes)
        if node.role in LIST_ROLES and options_of(node):
            return Select(node.id, rng.choice(options_of(node)))
        if node.role in TEXT_ROLES:
            asked = self._env.play.instruction
            words = [word for word in asked.split() if word.isalnum()] or ["a"]
            names = NAMES.findall(asked) or words
            return Type(node.id, rng.choice(names if rng.random() < 0.5 else words), rng.random() < 0.5)
        return Click(node.id)
