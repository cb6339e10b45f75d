"""Capture sessions over HTTP: opened, called, rewarded; each becomes one episode.

    POST   /sessions                    open one: its id, base URL and key                       a server's key
    POST   /sessions/ID/v1/…            chat completions and completions, recorded                the session's key
    GET    /sessions/ID                 how much is recorded                                      either
    POST   /sessions/ID/reward          its reward; closes it and writes the episode              a server's key
    DELETE /sessions/ID                 forget it                                                 a server's key

A session's own key suffices for the reward where the session says so, and everywhere where the server asks for no key.

Invariants: off unless a folder is given for what is recorded (a rollout worker's sessions, which it opens itself, go
into its episodes instead); a session ends at its deadline; no more than `capture_sessions` are open; a branch in which
something to be redacted occurs is in no episode, neither its text nor its tokens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from shoal.config import Serving
from shoal.errors import ConfigError, RecordError, StorageError
from shoal.protocol.codec import to_json
from shoal.protocol.episode import MAX_TEXT_CHARS, Episode, Outcome, Task
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.external import Draws
from shoal.rollout.session import Reward, Rules, Session, SessionOver
from shoal.serving.api import Api, json_response
from shoal.serving.errors import ApiError
from shoal.serving.keys import Keys
from shoal.serving.schema import Body, parsed

FILE = "episodes.jsonl"

MAX_SECRETS = 64
"""Texts that one session can name as to be redacted."""


class OpenBody(Body):
    """`POST /sessions`."""

    task: str = Field(default="", max_length=1024)
    """What the agent works on; the episode's task id."""
    group: str = Field(default="", max_length=256)
    """Sessions of one group try the same task."""
    index: int = Field(default=0, ge=0, le=2**31)
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Of every call; what the agent asks for is not applied."""
    max_tokens: int = Field(default=1024, ge=1, le=2**20)
    """Longest completion."""
    max_calls: int = Field(default=256, ge=1, le=1024)
    life_s: float | None = Field(default=None, gt=0)
    """Until its deadline; at most the server's own limit."""
    agent_rewards: bool = False
    """The session's own key may give the reward."""
    redact: list[str] = Field(default_factory=list, max_length=MAX_SECRETS)
    """Texts that may not be kept; branches in which they occur are left out."""


class RewardBody(Body):
    """`POST /sessions/ID/reward`."""

    reward: float
    parts: dict[str, float] = Field(default_factory=dict, max_length=64)
    output: str = Field(default="", max_length=MAX_TEXT_CHARS)
    """The agent's result, kept with the episode."""


@dataclass
class Entry:
    """An open session."""

    session: Session
    draws: Draws
    ends_at: float = float("inf")
    """Monotonic seconds."""
    task: Task = field(default_factory=lambda: Task(env="capture", id="-", seed=0))
    group: str = ""
    index: int = 0
    redact: Sequence[re.Pattern[str]] = ()
    started_at: float = field(default_factory=time.time)


class House:
    """The sessions of one server.

    Args:
        folder: where episodes go; without one, nobody can open a session over HTTP.

    Raises:
        ConfigError: a pattern to be redacted is no regular expression.
    """

    def __init__(self, keys: Keys, settings: Serving, folder: Path | None = None) -> None:
        self._keys = keys
        self._settings = settings
        self._folder = folder
        self.open: dict[str, Entry] = {}
        try:
            self._patterns = [re.compile(pattern) for pattern in settings.capture_redact]
        except re.error as error:
            raise ConfigError(f"capture_redact holds '{error.pattern!r}', which is no regular expression.") from None

    def entry(self, request: Request) -> Entry:
        """The session that a request names and may call."""
        entry, key = self._named(request), _key(request)
        if not entry.session.knows(key):
            raise ApiError(401, "This session's own key is needed, as Authorization: Bearer.", code="invalid_api_key")
        return entry

    def owned(self, request: Request, *, agent: bool = False) -> Entry:
        """The session that a request names and may end; with the session's own key if `agent` allows that."""
        entry, key = self._named(request), _key(request)
        of_session = entry.session.knows(key)
        if self._keys.names and not (self._keys.owner(key) or (of_session and agent)):
            raise ApiError(401, "A key of the server's is needed, as Authorization: Bearer.", code="invalid_api_key")
        if not self._keys.names and self._folder is None and not (of_session and agent):
            raise ApiError(401, "This session is its worker's to end.", code="invalid_api_key")
        return entry

    def begin(self, body: OpenBody, draws: Draws, max_context: int) -> Entry:
        """Open a session.

        Raises:
            ApiError: there are too many.
        """
        settings, now = self._settings, time.monotonic()
        self.sweep(now)
        if len(self.open) >= settings.capture_sessions:
            raise ApiError(429, "As many sessions are open as there may be.", code="overloaded", retry_after_s=10)
        params = SamplingParams(max_tokens=min(body.max_tokens, max_context), temperature=body.temperature)
        rules = Rules(
            params,
            max_calls=body.max_calls,
            max_tokens=settings.capture_tokens,
            agent_rewards=body.agent_rewards,
        )
        session = Session(rules)
        entry = Entry(
            session,
            draws,
            now + min(body.life_s or settings.capture_life_s, settings.capture_life_s),
            Task(env="capture", id=body.task or session.id, seed=0),
            body.group or session.id,
            body.index,
            [*self._patterns, *(re.compile(re.escape(text)) for text in body.redact if text)],
        )
        self.open[session.id] = entry
        return entry

    def rewarded(self, entry: Entry, body: RewardBody) -> Episode:
        """Close a session with its reward, and write its episode."""
        try:
            reward = Reward(body.reward, dict(body.parts))
            entry.session.close(reward)
        except RecordError as error:
            raise ApiError(400, str(error), param="reward") from None
        except SessionOver:
            raise ApiError(410, "This session is over.", code="session_over") from None
        episode = self._episode(entry, reward, body.output)
        if self._folder is not None:
            del self.open[entry.session.id]
            self._write(episode)
        return episode

    def forget(self, entry: Entry) -> None:
        entry.session.close()
        self.open.pop(entry.session.id, None)

    def sweep(self, now: float) -> None:
        """End the sessions whose time is over; what they recorded is kept as void."""
        for late in [entry for entry in self.open.values() if entry.ends_at <= now]:
            self.forget(late)
            if self._folder is not None:
                self._write(self._episode(late, None, ""))

    def _named(self, request: Request) -> Entry:
        self.sweep(time.monotonic())
        entry = self.open.get(request.path_params["id"])
        if entry is None:
            raise ApiError(404, "There is no such session, or it is over.", code="session_over")
        return entry

    def _episode(self, entry: Entry, reward: Reward | None, output: str) -> Episode:
        session = entry.session
        tree = session.tree.without(entry.redact) if entry.redact else session.tree
        reason = ""
        if reward is None:
            reason = "its time was over before it had a reward"
        elif not tree.calls:
            reason = "nothing is left of what it recorded" if session.tree.calls else "it asked the model nothing"
        outcome: Outcome = "void" if reason else "done"
        for pattern in entry.redact:
            output = pattern.sub("[redacted]", output)
        return Episode(
            id=session.id,
            group=entry.group,
            index=entry.index,
            task=entry.task,
            turns=tree.turns(),
            outcome=outcome,
            reward=0.0 if reason or reward is None else reward.value,
            reward_parts={} if reason or reward is None else reward.parts,
            void_reason=reason,
            output=output,
            temperature=session.rules.params.temperature,
            started_at=entry.started_at,
            finished_at=time.time(),
        )

    def _write(self, episode: Episode) -> None:
        assert self._folder is not None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self._folder / FILE).open("ab") as file:
                file.write(to_json(episode) + b"\n")
        except OSError as error:
            raise StorageError(f"{self._folder} cannot be written: {error.strerror}.") from None


async def open_session(api: Api, house: House, request: Request) -> Response:
    """`POST /sessions`."""
    body = parsed(await api.body(request), OpenBody)
    entry = house.begin(body, api.engine.draws, api.engine.context_tokens)
    session = entry.session
    return json_response(
        {
            "id": session.id,
            "object": "session",
            "base_url": f"{str(request.base_url).rstrip('/')}/sessions/{session.id}/v1",
            "api_key": session.key,
            "life_s": entry.ends_at - time.monotonic(),
        },
        201,
    )


async def session_state(_: Api, house: House, request: Request) -> Response:
    """`GET /sessions/ID`."""
    key = _key(request)
    entry = house.open.get(request.path_params["id"])
    found = entry if entry is not None and entry.session.knows(key) else house.owned(request)
    return json_response(_facts(found.session))


async def reward_session(api: Api, house: House, request: Request) -> Response:
    """`POST /sessions/ID/reward`."""
    entry = house.open.get(request.path_params["id"])
    entry = house.owned(request, agent=entry is not None and entry.session.rules.agent_rewards)
    body = parsed(await api.body(request), RewardBody)
    episode = house.rewarded(entry, body)
    facts = {**_facts(entry.session), "outcome": episode.outcome, "reason": episode.void_reason}
    return json_response(facts | {"kept_turns": len(episode.turns), "branches": len(episode.branches)})


async def forget_session(_: Api, house: House, request: Request) -> Response:
    """`DELETE /sessions/ID`."""
    house.forget(house.owned(request))
    return Response(status_code=204)


def _facts(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "session",
        "open": session.is_open,
        "calls": session.num_ended,
        "begun": session.num_begun,
        "tokens": session.tree.num_tokens,
    }


def _key(request: Request) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def message_text(parts: Sequence[Any]) -> str:
    """A message told apart from every other one: JSON with sorted keys."""
    return json.dumps(parts, sort_keys=True, ensure_ascii=False)
