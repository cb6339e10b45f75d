"""Tasks for an agent program of the user's own: what it is told, how its work is judged.

    [envs.sums]
    type = "external"
    settings = { command = ["python", "my_agent.py"], tasks = "arithmetic" }

The worker starts the command once an episode (`rollout.external`), out of process. The program finds the model under
`OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL`, and its task, one line of JSON, on its standard input and in
`SHOAL_TASK`. Its *result* is the last line of its standard output, read as JSON where it is JSON.

Invariants: tasks, splits and held-out lists are those of the environment `tasks`; a reward that the coordinator can
compute again (`tasks`, or a checker) depends on the task and on what the episode carries of the agent (its result, and
whether its last answer was cut off), on nothing else.

Not covered: a reward that the agent itself gives (`stdout`, `post`) is taken at its word.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from shoal.envs.base import Environment, EnvironmentSettings, Observation, Split, Step
from shoal.errors import ConfigError, TaskError
from shoal.protocol.codec import builtins
from shoal.protocol.episode import Episode, Task

log = logging.getLogger("shoal.envs")

OWN_REWARDS = ("stdout", "post")
"""Rewards that the agent gives."""

CRASHED = {"crashed": 1.0}
"""The parts of the reward of a program that failed, where it earns `crash_reward`."""

CHECK_TIMEOUT_S = 60.0
"""A checker that takes longer has failed."""

Checker = Callable[[dict[str, Any], Any], Any]


class ExternalSettings(EnvironmentSettings):
    """Which program acts, on which tasks, and who judges."""

    command: tuple[str, ...] = Field(min_length=1, max_length=64)
    """The program and its arguments; no shell."""
    tasks: str = Field(min_length=1, max_length=256)
    """The environment whose tasks it gets: a short name or an import path."""
    task_settings: dict[str, Any] = {}
    """That environment's settings."""
    reward: str = "tasks"
    """`tasks`: that environment grades the result as a reply; `stdout`: the result's `reward`; `post`: the program
    posts it to `SHOAL_REWARD_URL`; or a checker of your own, `package.module:function`, of the task and the result."""
    crash_reward: float | None = None
    """What a program earns that ends with an error; absent: its episode is void, and drawn again."""
    deadline_s: float = Field(default=120.0, gt=0, le=86_400)
    """The program is killed after this, and its episode void."""
    max_calls: int = Field(default=64, ge=1, le=1024)
    """Completions that one episode may ask for."""
    output_bytes: int = Field(default=65_536, ge=64, le=2**20)
    """A program that prints more is killed."""
    parallel: int = Field(default=16, ge=1, le=1024)
    """Programs that one worker runs at once."""
    preload: tuple[str, ...] = Field(default=(), max_length=64)
    """Modules that a Python program imports anyway, such as `openai`: imported once, in a process that every episode's
    program is forked from."""
    folder: str = ""
    """Where the program runs; by default where the worker runs."""

    @field_validator("reward")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("tasks", *OWN_REWARDS) and ":" not in value:
            raise ValueError("it is tasks, stdout, post, or a checker as package.module:function")
        return value

    @model_validator(mode="after")
    def _preload_is_for_python(self) -> ExternalSettings:
        if self.preload and (not Path(self.command[0]).name.startswith("python") or len(self.command) < 2):
            raise ValueError("preload is for commands such as ['python', 'agent.py'] or ['python', '-m', 'agent']")
        return self


class External(Environment):
    """An environment that a program acts in by itself, and that only judges."""

    Settings: ClassVar[type[EnvironmentSettings]] = ExternalSettings
    settings: ExternalSettings

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        from shoal.envs.registry import make

        super().__init__(settings, name=name)
        if self.settings.tasks == "external":
            raise ConfigError(f"environment {self.name!r} takes its tasks from itself.", "Name another in tasks.")
        self._inner = make(self.settings.tasks, self.settings.task_settings, name=self.name)
        self._checker = None
        if ":" in self.settings.reward:
            self._checker = _found(self.settings.reward)

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._inner.task(split, index, seed)

    def heldout(self, limit: int | None = None) -> list[Task]:
        return self._inner.heldout(limit)

    async def reset(self, task: Task) -> Observation:
        raise TaskError(f"environment {self.name!r} is acted in by a program of its own.", "Train it with shoal train.")

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        raise TaskError(f"environment {self.name!r} is acted in by a program of its own.", "Train it with shoal train.")

    async def told(self, task: Task) -> dict[str, Any]:
        """What the program is told: the task, and the messages that it would open with elsewhere."""
        env = self._inner.fresh()
        try:
            opening = await env.reset(task)
        finally:
            await env.close()
        return {
            "id": task.id,
            "seed": task.seed,
            "data": task.data,
            "messages": [builtins(message) for message in opening.messages],
        }

    async def graded(self, task: Task, output: str, *, truncated: bool) -> Step:
        """What a program's result earns.

        Args:
            output: what it printed.
            truncated: its last completion was cut off by the token limit.

        Raises:
            TaskError: the result carries no reward where it should, or the checker fails.
        """
        result = parsed(output)
        if self._checker is not None:
            return await self._checked(task, result)
        if self.settings.reward == "stdout":
            return _marked(result, f"the result {output[-200:]!r}")
        env = self._inner.fresh()
        try:
            await env.reset(task)
            step = await env.step(_reply(result), truncated=truncated)
        finally:
            await env.close()
        if not step.done:
            raise TaskError(
                f"environment {self.settings.tasks!r} has episodes of several turns, which one result does not end.",
                "Set reward to stdout, post or a checker.",
            )
        return step

    async def judge(self, episode: Episode) -> Step:
        if episode.reward_parts == CRASHED and self.settings.crash_reward is not None:
            return Step("", self.settings.crash_reward, True, dict(CRASHED))
        if self.settings.reward in OWN_REWARDS:
            return Step("", episode.reward, True, dict(episode.reward_parts))
        return await self.graded(episode.task, episode.output, truncated=was_cut(episode))

    async def _checked(self, task: Task, result: Any) -> Step:
        assert self._checker is not None
        told = await self.told(task)
        where = f"checker '{self.settings.reward}'"
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                found = await asyncio.to_thread(self._checker, told, result)
                if inspect.isawaitable(found):
                    found = await found
        except TimeoutError:
            raise TaskError(f"{where} took longer than {CHECK_TIMEOUT_S:.0f} s for task {task.id}.") from None
        except Exception as error:
            # The user's code may raise anything, and none of it is the agent's failure.
            log.exception("%s failed for task %s", where, task.id)
            raise TaskError(f"{where} failed for task {task.id}: {type(error).__name__}: {error}") from None
        return _marked(found, where)


def parsed(output: str) -> Any:
    """A program's result: its last line as JSON; where that is no JSON, all that it printed."""
    lines = output.strip().splitlines()
    if not lines:
        return ""
    try:
        return json.loads(lines[-1])
    except (ValueError, RecursionError):
        return output.strip()


def was_cut(episode: Episode) -> bool:
    """Whether the episode's last completion was cut off by the token limit."""
    return bool(episode.turns) and episode.turns[-1].completion.finish == "length"


def _reply(result: Any) -> str:
    """The text in a result that is graded as a reply."""
    if isinstance(result, Mapping) and "answer" in result:
        result = result["answer"]
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _marked(found: Any, where: str) -> Step:
    """A number, or a mapping with `reward` and perhaps `parts`, as an episode's last step."""
    value, parts = (found.get("reward"), found.get("parts", {})) if isinstance(found, Mapping) else (found, {})
    numbers = _is_number(value) and isinstance(parts, Mapping) and all(map(_is_number, parts.values()))
    if value is None or not numbers:
        raise TaskError(f"{where} gives no reward: a finite number, or one under 'reward' with numbers under 'parts'.")
    return Step("", float(value), True, {str(name)[:64]: float(part) for name, part in list(parts.items())[:64]})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _found(path: str) -> Checker:
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TaskError(
            f"the checker {path!r} cannot be imported: {error}.",
            "Install the package that holds it on every machine of the run, or put its folder on PYTHONPATH.",
        ) from None
    if not callable(function):
        raise TaskError(f"the checker {path!r} is no function.")
    checker: Checker = function
    return checker


def commands(environments: Sequence[Environment]) -> list[tuple[str, ...]]:
    """The programs that these environments would start."""
    return [env.settings.command for env in environments if isinstance(env, External)]
