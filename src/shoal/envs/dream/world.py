"""A world model at work: what an act would change, and whether a task is done.

    page, act ──▶ question (`prompt`) ──▶ engine or endpoint, under a grammar ──▶ reason, script ──▶ `apply` ──▶ page

Going back and scrolling need no model: a dream remembers its pages. An answer that was cut off at the token limit is
used as far as it can be read, and says so.

Invariants: a prediction is always a page, whatever the model wrote; what is wrong with the model or the way to it is a
`ShoalError`, never a page.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from shoal.envs.dream.edit import Script, apply
from shoal.envs.dream.prompt import REASON_CHARS, YES_NO, Sight, done_question, next_question
from shoal.envs.dream.script import read_script, script_grammar
from shoal.envs.web.actions import Action, GoBack, Scroll
from shoal.envs.web.tree import Page
from shoal.errors import ConfigError, NetworkError, RecordError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Grammar, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from shoal.engine.local import LocalEngine

CARD = "world.json"
"""Beside a fitted model: what it was fitted with."""
COPY = "copy"
"""The name of the world in which nothing ever changes: a baseline."""

KEY_VARIABLE = "WORLD_API_KEY"
ANSWER_TIMEOUT_S = 300.0
MAX_ANSWER_BYTES = 2**20
CONTEXT_TOKENS = 2048
MAX_SEQUENCES = 32
"""Questions answered together by an engine of this process; few of them are as long as its context."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a world model says comes next."""

    page: Page
    reason: str = ""
    script: Script = ()
    cut: bool = False
    """The answer was cut off by the token limit."""


class Speaker(ABC):
    """What answers a world model's questions."""

    @abstractmethod
    async def say(self, question: str, grammar: Grammar, max_tokens: int) -> str:
        """The most likely answer under the grammar.

        Raises:
            ShoalError: there is none.
        """


class EngineSpeaker(Speaker):
    """A model in an engine of this process."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    async def say(self, question: str, grammar: Grammar, max_tokens: int) -> str:
        prompt = tuple(self._engine.tokenizer.prompt([Message(role="user", content=question)]))
        room = self._engine.context_tokens - len(prompt)
        if room < 1:
            raise ConfigError(
                f"a question of {len(prompt)} tokens is longer than the world model's context.",
                "Give it a larger context, or fit one that is shown less of a page.",
            )
        params = SamplingParams(max_tokens=min(max_tokens, room), temperature=0.0)
        completion = await self._engine.sample(SampleRequest(prompt_ids=prompt, params=params, grammar=grammar))
        if completion.finish in ("cancelled", "error"):
            raise NetworkError(f"the world model's answer ended with '{completion.finish}'.")
        return completion.text


class EndpointSpeaker(Speaker):
    """A model that `shoal serve` serves (`response_format` of type `lark` or `regex`)."""

    def __init__(self, base_url: str, model: str = "") -> None:
        self._base_url = base_url.rstrip("/")
        self._model = model

    async def say(self, question: str, grammar: Grammar, max_tokens: int) -> str:
        import httpx

        key = os.environ.get(KEY_VARIABLE, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        where = f"the world model at {self._base_url}"
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S), httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S) as client:
                if not self._model:
                    listed = await client.get(f"{self._base_url}/models", headers=headers)
                    self._model = str(listed.json()["data"][0]["id"])
                body = {
                    "model": self._model,
                    "messages": [{"role": "user", "content": question}],
                    "temperature": 0,
                    "max_tokens": max_tokens,
                    "response_format": {"type": grammar.kind, grammar.kind: grammar.text},
                }
                answer = await client.post(f"{self._base_url}/chat/completions", json=body, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            raise NetworkError(f"{where} does not answer: {type(error).__name__}.", "Check the address.") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise NetworkError(f"{where} names no model.", "Serve it with: shoal serve MODEL.") from None
        if answer.status_code != 200 or len(answer.content) > MAX_ANSWER_BYTES:
            raise NetworkError(f"{where} answers {answer.status_code}: {answer.text[:200]}")
        try:
            return str(answer.json()["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise NetworkError(f"{where} gave no answer that can be read.") from None


class World:
    """A world model.

    Args:
        speaker: None is the world in which nothing changes and nothing is ever done.
        max_tokens: longest answer.
    """

    def __init__(self, speaker: Speaker | None, sight: Sight, max_tokens: int = 512) -> None:
        self.speaker = speaker
        self.sight = sight
        self._max_tokens = max_tokens

    async def next(self, instruction: str, page: Page, action: Action, back: Page | None = None) -> Prediction:
        """The page after an act.

        Args:
            back: what going back leads to.
        """
        if isinstance(action, GoBack):
            return Prediction(back if back is not None else page, "The page before comes back.")
        if isinstance(action, Scroll) or self.speaker is None:
            return Prediction(page)
        question, ids = next_question(instruction, page, action, self.sight)
        grammar = script_grammar(page, ids, reason_chars=REASON_CHARS)
        said = await self.speaker.say(question, grammar, self._max_tokens)
        return predicted(page, said)

    async def done(self, instruction: str, acts: list[str], page: Page) -> bool:
        """Whether it takes the task to be done."""
        if self.speaker is None:
            return False
        said = await self.speaker.say(done_question(instruction, acts, page, self.sight), YES_NO, 4)
        return said.strip() == "yes"


def predicted(page: Page, said: str) -> Prediction:
    """What an answer says comes after `page`; as much of it as can be read."""
    reason, _, written = said.partition("\n")
    lines = written.split("\n")
    for count in range(len(lines), 0, -1):
        try:
            script = read_script("\n".join(lines[:count]))
            return Prediction(apply(script, page, strict=False), reason, script, cut=count < len(lines))
        except RecordError:
            continue
    return Prediction(page, reason, (), cut=True)


def read_card(folder: Path) -> dict[str, Any]:
    """What a fitted world model was fitted with; empty for a model that was not."""
    path = folder / CARD
    if not path.exists():
        return {}
    try:
        card = json.loads(path.read_bytes())
        return dict(card)
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is damaged.", "Fit the world model again: shoal dream fit.") from None


def sight_of(card: dict[str, Any]) -> Sight:
    """Raises ConfigError where the card says none that can be used."""
    try:
        return Sight.model_validate(card.get("sight", {}))
    except ValidationError:
        raise ConfigError("the world model's card says no usable sight.", "Fit it again: shoal dream fit.") from None


_loading = threading.Lock()
_engines: dict[tuple[str, int, str], LocalEngine] = {}
"""Engines of this process: several environments dream with one."""


def open_world(where: str, *, max_tokens: int = 512, threads: int = 1, device: str = "auto") -> World:
    """The world model at `where`: `copy`, an endpoint's address, a folder of `shoal dream fit`, or any model's name.

    A model is loaded once in a process, and stays.

    Raises:
        ModelError, ConfigError: it cannot be had.
    """
    if where == COPY:
        return World(None, Sight())
    if where.startswith(("http://", "https://")):
        return World(EndpointSpeaker(where), Sight(), max_tokens)
    card = read_card(Path(where))
    with _loading:
        speaker = EngineSpeaker(_engine(where, threads, device))
    return World(speaker, sight_of(card), max_tokens)


def _engine(where: str, threads: int, device: str) -> LocalEngine:
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.fabric.identity import data_dir

    folder = Path(where)
    key = (str(folder.resolve()) if folder.is_dir() else where, threads, device)
    engine = _engines.get(key)
    if engine is None or not engine.is_alive:
        name = str(folder / "model") if (folder / "model").is_dir() else where
        source = resolve(name, data_dir() / "models")
        engine = _engines[key] = LocalEngine(
            source,
            threads=threads,
            device=device,
            max_sequences=MAX_SEQUENCES,
            cache_tokens=MAX_SEQUENCES * CONTEXT_TOKENS // 2,
            context_tokens=CONTEXT_TOKENS,
        )
    return engine


async def close_worlds() -> None:
    """End the engines of this process."""
    while _engines:
        _, engine = _engines.popitem()
        await engine.close()
