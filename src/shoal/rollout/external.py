"""`ExternalActing`: one task, one program of the user's, one session that records what it asks the model.

    session opened ──▶ program started, told its task ──▶ it calls the model, as often as it likes ──▶ it ends
                  ──▶ session closed ──▶ result judged ──▶ Episode

Responsibilities: the programs of one worker, how many run at once, and what their ends mean.

Invariants: the session ends with the program; a program that fails, prints too much, takes too long or asks the model
nothing gives a `void` episode that says why, never reward 0 (unless the environment has a `crash_reward`); nothing that
a program started outlives its episode.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Protocol

from shoal.engine.sequence import Drawn
from shoal.engine.shaping import Shaping
from shoal.envs.base import Step
from shoal.envs.external import CRASHED, External
from shoal.errors import ShoalError
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Completion, SampleRequest
from shoal.rollout.episode import MAX_REASON_CHARS, EpisodeSpec
from shoal.rollout.nursery import Ended, Nursery
from shoal.rollout.session import Reward, Rules, Session

log = logging.getLogger("shoal.rollout")

MAX_TASK_VARIABLE_BYTES = 65_536
"""A longer task is on standard input alone: the kernel bounds an environment."""

Draws = Callable[[SampleRequest, Shaping], AsyncGenerator[Drawn | Completion]]


class Sessions(Protocol):
    """Where sessions are reached over HTTP."""

    model: str
    """What the model is called there; any other name does as well."""

    def opened(self, session: Session, draws: Draws) -> AbstractContextManager[str]:
        """Answer the session's calls with what `draws` draws, while inside; gives its URL, without `/v1`."""


class Stopped(ShoalError):
    """A program did not end as it should."""


class ExternalActing:
    """Acts in external environments.

    Args:
        sessions: where programs find the model.
        context_tokens: the longest sequence; bounds what a session records.
    """

    def __init__(self, sessions: Sessions, *, context_tokens: int) -> None:
        self._sessions = sessions
        self._context_tokens = context_tokens
        self._nurseries: dict[str, Nursery] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}

    async def close(self) -> None:
        """End whatever still runs."""
        await asyncio.gather(*(nursery.close() for nursery in self._nurseries.values()))

    async def run_episode(self, spec: EpisodeSpec, env: External, draws: Draws) -> Episode:
        """Have the program work on one task."""
        started = time.time()
        settings = env.settings
        rules = Rules(
            spec.params,
            min_version=spec.min_version,
            max_calls=settings.max_calls,
            max_tokens=settings.max_calls * self._context_tokens,
            agent_rewards=settings.reward == "post",
        )
        session = Session(rules)
        turns: tuple[Turn, ...] = ()
        output = reason = ""
        step = Step("", 0.0, True)
        try:
            ended = await self._acted(env, session, spec, draws)
            turns, output = session.tree.turns(), ended.stdout.strip()
            step = await self._judged(env, spec, session, ended)
        except (ShoalError, OSError, TimeoutError) as error:
            # Surviving here is the feature: infrastructure's failure is told apart from the agent's.
            reason = str(error)[:MAX_REASON_CHARS] or type(error).__name__
        return Episode(
            id=spec.id,
            group=spec.group,
            index=spec.index,
            task=spec.task,
            turns=session.tree.turns() if reason else turns,
            outcome="void" if reason else "done",
            reward=0.0 if reason else step.reward,
            reward_parts={} if reason else dict(step.info),
            void_reason=reason,
            output=output,
            temperature=spec.params.temperature,
            worker=spec.worker,
            started_at=started,
            finished_at=time.time(),
        )

    async def _acted(self, env: External, session: Session, spec: EpisodeSpec, draws: Draws) -> Ended:
        """Run the program to its end, the session open meanwhile."""
        settings = env.settings
        task = json.dumps(await env.told(spec.task), ensure_ascii=False)
        slots = self._slots.setdefault(env.name, asyncio.Semaphore(settings.parallel))
        async with slots:
            with self._sessions.opened(session, draws) as url:
                try:
                    return await self._nursery(env).run(
                        self._environment(session, url, task),
                        task + "\n",
                        deadline_s=settings.deadline_s,
                        output_bytes=settings.output_bytes,
                    )
                finally:
                    session.close()

    def _nursery(self, env: External) -> Nursery:
        if env.name not in self._nurseries:
            settings = env.settings
            self._nurseries[env.name] = Nursery(settings.command, preload=settings.preload, folder=settings.folder)
        return self._nurseries[env.name]

    def _environment(self, session: Session, url: str, task: str) -> dict[str, str]:
        """What the program inherits: this process's environment but for Shoal's own variables, and its session."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        told = {
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": session.key,
            "OPENAI_MODEL": self._sessions.model,
            "SHOAL_REWARD_URL": f"{url}/reward",
        }
        if len(task.encode()) <= MAX_TASK_VARIABLE_BYTES:
            told["SHOAL_TASK"] = task
        return inherited | told

    async def _judged(self, env: External, spec: EpisodeSpec, session: Session, ended: Ended) -> Step:
        """What the episode earned.

        Raises:
            ShoalError: why it is void.
        """
        settings = env.settings
        if ended.why == "deadline":
            raise Stopped(f"the agent took longer than {settings.deadline_s:g} s.")
        if ended.why == "output":
            raise Stopped(f"the agent printed more than {settings.output_bytes} bytes.")
        calls = session.tree.calls
        if not calls:
            raise Stopped(f"the agent ended with {ended.exit_code} and asked the model nothing: {ended.complaint}")
        if ended.exit_code != 0:
            if settings.crash_reward is None:
                raise Stopped(f"the agent ended with {ended.exit_code}: {ended.complaint}")
            return Step("", settings.crash_reward, True, dict(CRASHED))
        if settings.reward == "post":
            return _posted(session.reward)
        return await env.graded(spec.task, ended.stdout.strip(), truncated=calls[-1].completion.finish == "length")


def _posted(reward: Reward | None) -> Step:
    if reward is None:
        raise Stopped("the agent ended without posting a reward to SHOAL_REWARD_URL.")
    return Step("", reward.value, True, dict(reward.parts))
