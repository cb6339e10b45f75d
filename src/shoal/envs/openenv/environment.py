"""OpenEnv environments: a server somewhere plays the world, Shoal's agent acts in it.

    [envs.game]
    type = "openenv"
    settings = { base_url = "http://127.0.0.1:8000", form = "text", action_key = "message" }

A task is a seed that the environment is reset with, or a place in a split of the server's own task list.

Invariants: training and held-out tasks differ, in their seeds or in their splits; one episode is one session, ended
with it; a server that fails makes an episode void; an action that it does not take is answered with what is wrong.

Not covered: a server whose episodes do not follow from seed and actions alone cannot be played again. `openenv_live` is
for those: there a worker is taken at its word.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field, field_validator, model_validator

from shoal.envs.base import Environment, EnvironmentSettings, Observation, Split, Step, check_cursor, stable_int
from shoal.envs.openenv.acting import Acting, ActionError, Form
from shoal.envs.openenv.session import Observed, Refused, Server, Session, require_websockets
from shoal.errors import RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import MAX_TURNS, Episode, Task
from shoal.protocol.sampling import Grammar

HELDOUT_SEEDS_FROM = 2**30
"""Held-out tasks have the seeds from here on, training tasks those below; numpy takes both."""


class OpenEnvSettings(EnvironmentSettings):
    """Where the server is, what a reply means there, and what is shown of its answers."""

    base_url: str = Field(min_length=1)
    """The server, as `http://127.0.0.1:8000`; every worker and the coordinator must reach it."""
    form: Form = "json"
    """What a reply is: `text`, one field of the action; `json`, the action itself; `tool`, a call of a tool."""
    action_key: str = ""
    """For `text`: the field."""
    constrain: bool = True
    """Whether replies are held to the server's schema (`json`, `tool`)."""
    observation_keys: tuple[str, ...] = ()
    """The fields of an observation that are shown; one alone is shown as it is, several as JSON. None: all of them."""
    observation_chars: int = Field(default=8000, ge=16, le=2**18)
    """Longer observations are cut."""
    instruction: str = ""
    """What stands above the first observation."""
    system: str = ""
    """A system message; empty for none."""
    reset: dict[str, Any] = {}
    """What the environment is reset with beside the seed."""
    train_split: str = ""
    """A split of the server's own task list to train on; absent: tasks are seeds."""
    heldout_split: str = ""
    """The split to evaluate on."""
    max_turns: int = Field(default=32, ge=1, le=MAX_TURNS)
    """An episode that is not over by then ends there."""
    error_reward: float | None = None
    """What an action earns that makes the environment fail, which ends the episode; absent: the episode is void."""
    parallel: int = Field(default=1, ge=1, le=1024)
    """Sessions at once in one process; the server's `max_concurrent_envs` bounds those of all processes together."""
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """The longest wait for one answer, and for a session on a full server."""
    key_variable: str = ""
    """The variable of the worker's environment that holds the server's bearer token, if it wants one."""

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("it must begin with http:// or https://")
        return value

    @model_validator(mode="after")
    def _fits(self) -> OpenEnvSettings:
        if (self.form == "text") != bool(self.action_key):
            raise ValueError("action_key names the action's field where form is text, and only there")
        if bool(self.train_split) != bool(self.heldout_split) or self.train_split == self.heldout_split != "":
            raise ValueError("train_split and heldout_split are two splits, or none")
        return self


_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = WeakKeyDictionary()
_schemas: dict[str, dict[str, Any]] = {}


@lru_cache(maxsize=64)
def _num_tasks(server: Server, split: str) -> int:
    """Asked once in a process: what a task is may not change under a run."""
    found = server.num_tasks(split)
    if found < 1:
        raise TaskError(f"the OpenEnv server at {server.base_url} has no task in its split {split!r}.")
    return found


class OpenEnv(Environment):
    """One environment of a server."""

    Settings: ClassVar[type[EnvironmentSettings]] = OpenEnvSettings
    settings: OpenEnvSettings

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        """Raises: ConfigError where this machine lacks the WebSocket client."""
        super().__init__(settings, name=name)
        require_websockets()
        self._server = Server(self.settings.base_url, self.settings.timeout_s, self.settings.key_variable)
        self._slot: asyncio.Semaphore | None = None
        self._session: Session | None = None
        self._acting = Acting("text")
        self._turns = self._refused = 0

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        listed = self.settings.train_split if split == "train" else self.settings.heldout_split
        if not listed:
            drawn = stable_int("openenv", seed, index) % HELDOUT_SEEDS_FROM
            chosen = drawn if split == "train" else HELDOUT_SEEDS_FROM + index
            return Task(env=self.name, id=f"seed-{chosen}", seed=chosen)
        size = _num_tasks(self._server, listed)
        place = index % size if split == "heldout" else stable_int("openenv", seed, index) % size
        return Task(env=self.name, id=f"{listed}-{place}", seed=place, data={"split": listed, "index": place})

    async def reset(self, task: Task) -> Observation:
        await self.close()
        slots = _slots.setdefault(asyncio.get_running_loop(), {})
        slot = slots.setdefault(self.settings.base_url, asyncio.Semaphore(self.settings.parallel))
        await slot.acquire()
        self._slot = slot
        self._session, seen = await self._server.begun({**self.settings.reset, "seed": task.seed, **task.data})
        self._acting = await self._form(self._session)
        self._turns = self._refused = 0
        if seen.done:
            raise TaskError(f"task {task.id} of environment {self.name!r} is over before it begins.")
        parts = (self.settings.instruction, self._shown(seen), self._acting.told)
        said = Message(role="user", content="\n\n".join(part for part in parts if part))
        opening = (Message(role="system", content=self.settings.system),) if self.settings.system else ()
        return Observation((*opening, said), self._grammar)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        if self._session is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        self._turns += 1
        try:
            seen = await self._session.step(self._acting.read(action))
        except ActionError as error:
            return await self._answered(str(error), 0.0, done=False, refused=True)
        except Refused as error:
            if error.code == "VALIDATION_ERROR":
                return await self._answered(f"That is no action here: {error.complaint}", 0.0, done=False, refused=True)
            if error.code != "EXECUTION_ERROR" or self.settings.error_reward is None:
                raise
            return await self._answered("", self.settings.error_reward, done=True, refused=True)
        return await self._answered(self._shown(seen), float(seen.reward or 0.0), done=seen.done)

    async def _answered(self, said: str, reward: float, *, done: bool, refused: bool = False) -> Step:
        self._refused += refused
        over = done or self._turns >= self.settings.max_turns
        if over:
            await self.close()
        parts = {"turns": float(self._turns), "refused": float(self._refused)}
        return Step("" if over else said, reward, over, parts, None if over else self._grammar)

    async def _form(self, session: Session) -> Acting:
        form, url = self.settings.form, self.settings.base_url
        if form == "tool":
            return Acting(form, tools=await session.tools())
        if form == "json" and url not in _schemas:
            _schemas[url] = await self._server.action_schema()
        return Acting(form, self.settings.action_key, _schemas.get(url))

    def _shown(self, seen: Observed) -> str:
        return self._acting.shown(seen.observation, self.settings.observation_keys, self.settings.observation_chars)

    @property
    def _grammar(self) -> Grammar | None:
        return self._acting.grammar if self.settings.constrain else None

    async def close(self) -> None:
        session, slot, self._session, self._slot = self._session, self._slot, None, None
        try:
            if session is not None:
                await session.close()
        finally:
            if slot is not None:
                slot.release()


class LiveOpenEnv(OpenEnv):
    """One of a server that does not give the same episode twice: a worker is taken at its word."""

    async def judge(self, episode: Episode) -> Step:
        if not 1 <= len(episode.turns) <= self.settings.max_turns:
            raise RecordError(f"an episode of task {episode.task.id} has {len(episode.turns)} turns.")
        return Step("", episode.reward, True, dict(episode.reward_parts))
