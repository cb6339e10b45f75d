"""The single-turn case: one question, one reply, one grade.

A subclass says what the question is and which parts a reply earns; this module builds the conversation, applies the
reward setting and keeps the rule that both measures of evaluation share: a reply cut off by the token limit is never
*strictly* right.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from shoal.envs.base import Environment, EnvironmentSettings, Observation, Step
from shoal.errors import TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task


class QuestionSettings(EnvironmentSettings):
    """What all question environments can be told."""

    instruction: str = ""
    """A sentence put after every question."""
    system: str = ""
    """A system message; empty for none (the model's own template may still add one)."""
    reward: Literal["strict", "lenient", "mixed"] = "strict"
    """`strict`: the reply ends with the right answer and was not cut off; `lenient`: its last answer is right;
    `mixed`: the mean of the two."""


class QuestionEnvironment(Environment):
    """An environment whose episodes are one question and one reply."""

    Settings: ClassVar[type[EnvironmentSettings]] = QuestionSettings
    settings: QuestionSettings
    _asked: Task | None = None

    @abstractmethod
    def question(self, task: Task) -> str:
        """The question that `task` asks; raises `TaskError` where the task is not this environment's."""

    @abstractmethod
    def grade(self, task: Task, reply: str) -> dict[str, float]:
        """The parts that `reply` earns, each in 0..1, `strict` and `lenient` among them."""

    async def reset(self, task: Task) -> Observation:
        text = self.question(task)
        self._asked = task
        if self.settings.instruction:
            text = f"{text} {self.settings.instruction}"
        opening = (Message(role="system", content=self.settings.system),) if self.settings.system else ()
        return Observation((*opening, Message(role="user", content=text)))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        if self._asked is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        parts = self.grade(self._asked, action)
        self._asked = None
        if truncated:
            parts["strict"] = 0.0
        mode = self.settings.reward
        reward = (parts["strict"] + parts["lenient"]) / 2 if mode == "mixed" else parts[mode]
        return Step("", reward, True, parts)
