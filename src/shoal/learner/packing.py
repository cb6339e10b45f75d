"""Trajectories become micro-batches: one row of tokens each, in which the rollouts of a group share their prompt.

    row      [ prompt A | a1 | a2 | … | aG | prompt B | b1 | … | bG ]
    position   0 … P-1   P…   P…        P…   0 … Q-1    Q…      Q…

Each rollout attends to its prompt and causally to itself (`attention`), so a prompt is computed once for its group.
Groups are placed by length, longest first, in the first row with room (first-fit decreasing), so there is no
padding. The last trained token of a rollout predicts nothing, so it is a target and not an input.

Invariants: every trained token of every trajectory is a target exactly once, in exactly one micro-batch, with its
log-probability, advantage and version; a trajectory never spans two micro-batches; a row exceeds `limit` only where
one trajectory alone does. Pure numpy; the result depends on the input alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.learner.batch import Trajectory
from shoal.protocol.sampling import Grammar

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """One prompt and its rollouts inside a row: where it starts, and how many input tokens each part has."""

    start: int
    prefix: int
    lengths: tuple[int, ...]
    """Of each rollout, without the prompt and without its last trained token; may be 0."""

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.lengths)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One row of T input tokens, and its N targets in the order of their trajectories."""

    input_ids: Ints
    position_ids: Ints
    spans: tuple[Span, ...]
    predict_at: Ints
    """[N] position in the row of the token whose hidden state predicts the target."""
    targets: Ints
    behaviour: Floats
    advantages: Floats
    temperatures: Floats
    versions: Ints
    sequence: Ints
    """[N] which of `members` the target belongs to, as an index into it."""
    lengths: Ints
    """[N] number of trained tokens of the target's sequence: all branches of its episode."""
    members: tuple[int, ...]
    """Which of the packed trajectories are here, as indices into the sequence that was packed."""
    grammars: tuple[tuple[int, int, Grammar], ...] = ()
    """Runs of targets that had to match a grammar: index of the first, how many, and what they had to match."""


@dataclass(frozen=True)
class _Shared:
    """Trajectories with one prompt, to be placed together. `sizes` are their input tokens after the prompt."""

    prefix: int
    members: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.prefix + sum(self.sizes)


def pack(trajectories: Sequence[Trajectory], limit: int) -> list[MicroBatch]:
    """Micro-batches of about `limit` input tokens; trajectories without trained tokens must not be among them."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for index, item in enumerate(trajectories):
        prompt = item.token_ids[: item.prefix_length].tobytes()
        groups.setdefault((item.group, prompt), []).append(index)
    shared = [part for members in groups.values() for part in _split(trajectories, members, limit)]
    rows: list[list[_Shared]] = []
    room: list[int] = []
    for part in sorted(shared, key=lambda part: -part.total):
        row = next((i for i, free in enumerate(room) if free >= part.total), None)
        if row is None:
            rows.append([])
            room.append(limit)
            row = len(rows) - 1
        rows[row].append(part)
        room[row] -= part.total
    return [_lay_out(trajectories, parts) for parts in rows]


def _last_input(item: Trajectory) -> int:
    """How many tokens of a trajectory are fed to the model: all before its last trained one."""
    return int(np.flatnonzero(item.trained)[-1])


def _split(trajectories: Sequence[Trajectory], members: list[int], limit: int) -> list[_Shared]:
    """Cut a group that is longer than `limit` into parts that repeat the prompt, longest rollouts first."""
    prefix = trajectories[members[0]].prefix_length
    sized = sorted(((_last_input(trajectories[m]) - prefix, m) for m in members), key=lambda pair: (-pair[0], pair[1]))
    parts: list[list[tuple[int, int]]] = []
    used = limit
    for size, member in sized:
        if not parts or used + size > limit:
            parts.append([])
            used = prefix
        parts[-1].append((size, member))
        used += size
    return [_Shared(prefix, tuple(m for _, m in part), tuple(s for s, _ in part)) for part in parts]


def _lay_out(trajectories: Sequence[Trajectory], parts: Sequence[_Shared]) -> MicroBatch:
    """Write prompts and rollouts one after another and note where each target's prediction comes from."""
    ids: list[Ints] = []
    positions: list[Ints] = []
    spans: list[Span] = []
    predict_at: list[Ints] = []
    members: list[int] = []
    cursor = 0
    for part in parts:
        spans.append(Span(cursor, part.prefix, part.sizes))
        prompt_end = cursor + part.prefix
        ids.append(trajectories[part.members[0]].token_ids[: part.prefix])
        positions.append(np.arange(part.prefix))
        cursor = prompt_end
        for member, size in zip(part.members, part.sizes, strict=True):
            item = trajectories[member]
            ids.append(item.token_ids[part.prefix : part.prefix + size])
            positions.append(np.arange(part.prefix, part.prefix + size))
            source = np.flatnonzero(item.trained) - 1
            # A rollout's first token is predicted by the end of the prompt, the others by their predecessor.
            predict_at.append(np.where(source < part.prefix, prompt_end - part.prefix, cursor - part.prefix) + source)
            members.append(member)
            cursor += size
    items = [trajectories[member] for member in members]
    counts = np.array([item.num_trained for item in items], dtype=np.int64)
    return MicroBatch(
        input_ids=np.concatenate(ids),
        position_ids=np.concatenate(positions),
        spans=tuple(spans),
        predict_at=np.concatenate(predict_at),
        targets=np.concatenate([item.token_ids[item.trained] for item in items]),
        behaviour=np.concatenate([item.behaviour[item.trained] for item in items]),
        advantages=np.repeat([item.advantage for item in items], counts),
        temperatures=np.repeat([item.temperature for item in items], counts),
        versions=np.concatenate([item.versions[item.trained] for item in items]),
        sequence=np.repeat(np.arange(len(items)), counts),
        lengths=np.repeat([item.sequence_trained for item in items], counts),
        members=tuple(members),
        grammars=tuple(_grammars(items, counts)),
    )


def _grammars(items: Sequence[Trajectory], counts: Ints) -> Iterator[tuple[int, int, Grammar]]:
    """Each trajectory's constrained completions, as runs of targets."""
    for item, first in zip(items, np.cumsum(counts) - counts, strict=True):
        for start, length, grammar in item.grammars:
            yield int(first) + int(item.trained[:start].sum()), length, grammar
