"""What supervised fine-tuning learns from: conversations and episodes in JSON Lines, as trajectories.

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}     every assistant turn
    {"prompt": …, "completion": …}                                                              one turn
    a line of a run's episodes/*.jsonl                              its tokens as drawn, if its reward is high enough

Invariants: text is rendered exactly as the engine renders it when it samples (`engine.tokenizer`): the prompt by the
chat template, what comes between two acts by its continuation, and an act ends with the token that ends a turn; a line
that cannot be read is named by file and number; one that is longer than the limit is left out whole and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, RecordError, StorageError
from shoal.learner.batch import Trajectory, trajectories
from shoal.protocol.chat import Message
from shoal.protocol.codec import from_json
from shoal.protocol.episode import Episode

MAX_LINE_BYTES = 16 * 2**20
ROLES = ("system", "user", "assistant")


@dataclass
class Examples:
    """What was read."""

    items: list[Trajectory] = field(default_factory=list)
    num_too_long: int = 0
    num_below_reward: int = 0
    """Episodes that did not earn enough, or were void."""


def read_examples(path: Path, tokenizer: Tokenizer, *, max_tokens: int, min_reward: float) -> Examples:
    """All lines of a file.

    Args:
        max_tokens: longer ones are left out.
        min_reward: of an episode; those that earned less are left out.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a line is not one of the kinds above, or nothing is left.
    """
    found = Examples()
    for where, line in _lines(path):
        items = _example(line, where, tokenizer, min_reward, len(found.items))
        found.num_below_reward += not items
        for item in items:
            if len(item.token_ids) > max_tokens:
                found.num_too_long += 1
            else:
                found.items.append(item)
    if not found.items:
        raise ConfigError(
            f"{path} holds nothing to learn from: {found.num_too_long} lines are longer than {max_tokens} tokens, "
            f"{found.num_below_reward} episodes earned less than {min_reward:g}.",
            "Raise --max-tokens, lower --min-reward, or give another file.",
        )
    return found


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, line {number} has more than {MAX_LINE_BYTES >> 20} MiB.")
                if line.strip():
                    yield f"{path}, line {number}", line
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from None


def _example(line: bytes, where: str, tokenizer: Tokenizer, min_reward: float, index: int) -> list[Trajectory]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from None
    if isinstance(data, dict) and "turns" in data:
        return _from_episode(line, where, min_reward, index)
    if isinstance(data, dict) and isinstance(data.get("prompt"), str) and isinstance(data.get("completion"), str):
        messages = [Message(role="user", content=data["prompt"]), Message(role="assistant", content=data["completion"])]
    else:
        messages = _messages(data, where)
    return [_from_messages(messages, where, tokenizer, index)]


def _messages(data: Any, where: str) -> list[Message]:
    raw = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(raw, list) or not raw:
        raise ConfigError(
            f'{where} has neither "messages" nor "prompt" and "completion", and is no episode.',
            'Write lines such as {"messages": [{"role": "user", "content": "…"}, …]}.',
        )
    for one in raw:
        if not isinstance(one, dict) or one.get("role") not in ROLES or not isinstance(one.get("content"), str):
            raise ConfigError(f"{where}: each message needs a role of {', '.join(ROLES)}, and content that is text.")
    return [Message(role=one["role"], content=one["content"]) for one in raw]


def _from_messages(messages: Sequence[Message], where: str, tokenizer: Tokenizer, index: int) -> Trajectory:
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    expected = ["assistant" if i % 2 == 0 else "user" for i in range(len(messages) - first)]
    if first in (0, len(messages)) or [m.role for m in messages[first:]] != expected or expected[-1] != "assistant":
        raise ConfigError(
            f"{where}: after the opening, assistant and user take turns, and the assistant speaks last.",
            "Leave out or split what does not fit.",
        )
    prompt = tokenizer.prompt(messages[:first])
    ids, trained = list(prompt), [False] * len(prompt)
    act: list[int] = []
    for message in messages[first:]:
        if message.role == "assistant":
            act = [*tokenizer.encode(message.content), tokenizer.end_of_turn]
            ids += act
            trained += [True] * len(act)
        else:
            between = tokenizer.continuation(act, message.content)
            ids += between
            trained += [False] * len(between)
    return Trajectory(
        group=str(index),
        token_ids=np.array(ids, dtype=np.int64),
        trained=np.array(trained, dtype=np.bool_),
        behaviour=np.zeros(len(ids)),
        versions=np.full(len(ids), -1, dtype=np.int64),
        prefix_length=len(prompt),
        advantage=1.0,
        temperature=1.0,
    )


def _from_episode(line: bytes, where: str, min_reward: float, index: int) -> list[Trajectory]:
    try:
        episode = from_json(line, Episode)
    except RecordError as error:
        raise ConfigError(f"{where} is no episode: {error.problem}") from None
    if episode.outcome != "done" or episode.reward < min_reward:
        return []
    # Learnt as plain text is: at temperature 1, whatever it was drawn at, and without what a grammar forbade.
    plain = [
        Trajectory(
            group=str(index),
            token_ids=made.token_ids,
            trained=made.trained,
            behaviour=made.behaviour,
            versions=made.versions,
            prefix_length=made.prefix_length,
            advantage=1.0,
            temperature=1.0,
        )
        for made in trajectories(replace(episode, temperature=1.0), 1.0)
    ]
    return [one for one in plain if one.num_trained]
