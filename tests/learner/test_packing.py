"""Packing loses nothing: every trained token is a target once, and each rollout can be read back from its row."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_cases import completion, episode, random_episodes, random_ids

from shoal.config.learner import Advantage
from shoal.errors import RunError
from shoal.learner.batch import Trajectory, assemble, trajectories
from shoal.learner.packing import MicroBatch, pack
from shoal.protocol.episode import Episode, Turn


@st.composite
def batches(draw: st.DrawFn) -> list[Episode]:
    """Groups of one or more turns; sometimes a group's first contexts differ."""
    episodes = random_episodes(
        draw(st.integers(0, 10_000)),
        groups=draw(st.integers(1, 5)),
        size=draw(st.integers(1, 6)),
        max_prompt=draw(st.integers(1, 30)),
        max_response=draw(st.integers(1, 20)),
        max_turns=draw(st.integers(1, 3)),
    )
    rng = random.Random(draw(st.integers(0, 100)))
    for k, item in enumerate(episodes):
        if rng.random() < draw(st.sampled_from([0.0, 0.3])):
            first = item.turns[0]
            other = Turn(context_ids=random_ids(rng, 5), observation="", completion=first.completion)
            episodes[k] = episode(item.group, item.index, [other, *item.turns[1:]], item.reward)
    return episodes


def unpack(row: MicroBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Slow reference: per member its input ids, its positions, and its targets' places in the trajectory."""
    found = {}
    members = iter(row.members)
    number = 0
    for span in row.spans:
        prompt = list(range(span.start, span.start + span.prefix))
        cursor = span.start + span.prefix
        for length in span.lengths:
            member = next(members)
            places = prompt + list(range(cursor, cursor + length))
            cursor += length
            targets = [places.index(p) + 1 for p in row.predict_at[row.sequence == number]]
            found[member] = (
                [int(row.input_ids[p]) for p in places],
                [int(row.position_ids[p]) for p in places],
                targets,
            )
            number += 1
    assert cursor == len(row.input_ids)
    return found


@given(batches(), st.integers(8, 200))
def test_unpacking_gives_back_what_was_packed(episodes: list[Episode], limit: int) -> None:
    items, _ = assemble(episodes, Advantage(), skip=False)
    rows = pack(items, limit)
    seen: set[int] = set()
    for row in rows:
        for number, (member, (ids, positions, targets)) in enumerate(unpack(row).items()):
            assert member not in seen
            seen.add(member)
            item = items[member]
            mine = row.sequence == number
            assert positions == list(range(len(ids)))
            assert ids == item.token_ids[: len(ids)].tolist()
            assert targets == np.flatnonzero(item.trained).tolist()
            assert len(ids) == targets[-1]
            assert row.targets[mine].tolist() == item.token_ids[item.trained].tolist()
            assert row.behaviour[mine].tolist() == item.behaviour[item.trained].tolist()
            assert row.versions[mine].tolist() == item.versions[item.trained].tolist()
            assert set(row.advantages[mine]) == {item.advantage}
            assert set(row.temperatures[mine]) == {item.temperature}
            assert set(row.lengths[mine]) == {item.num_trained}
    assert seen == set(range(len(items)))


@given(batches(), st.integers(8, 200))
def test_every_drawn_token_is_trained_once_with_its_logprob_and_version(episodes: list[Episode], limit: int) -> None:
    items, summary = assemble(episodes, Advantage(), skip=False)
    drawn = sorted(
        token
        for e in episodes
        for turn in e.turns
        for token in zip(turn.completion.token_ids, turn.completion.logprobs, turn.completion.versions, strict=True)
    )
    rows = pack(items, limit)
    packed = sorted(
        (int(t), float(b), int(v))
        for row in rows
        for t, b, v in zip(row.targets, row.behaviour, row.versions, strict=True)
    )
    assert packed == drawn
    assert summary.num_tokens == len(drawn)


@given(batches(), st.integers(8, 200))
def test_rows_respect_the_limit_and_share_prompts(episodes: list[Episode], limit: int) -> None:
    items, _ = assemble(episodes, Advantage(), skip=False)
    rows = pack(items, limit)
    for row in rows:
        assert len(row.input_ids) <= limit or len(row.members) == 1
    alone = sum(int(np.flatnonzero(item.trained)[-1]) for item in items)
    assert sum(len(row.input_ids) for row in rows) <= alone


def test_a_group_within_the_limit_computes_its_prompt_once() -> None:
    rng = random.Random(0)
    prompt = random_ids(rng, 20)
    turns = [
        [Turn(context_ids=prompt, observation="", completion=completion(random_ids(rng, 5), rng))] for _ in range(8)
    ]
    episodes = [episode("g", k, t, float(k)) for k, t in enumerate(turns)]
    (row,) = pack(assemble(episodes, Advantage())[0], 1000)
    assert len(row.input_ids) == 20 + 8 * 4
    assert len(row.targets) == 8 * 5
    split = pack(assemble(episodes, Advantage())[0], 40)
    assert [len(r.members) for r in split] == [5, 3]
    assert all(r.spans[0].prefix == 20 for r in split)


def test_packing_is_a_function_of_its_input() -> None:
    items, _ = assemble(random_episodes(1, groups=6), Advantage())
    first, second = pack(items, 64), pack(items, 64)
    assert [r.input_ids.tolist() for r in first] == [r.input_ids.tolist() for r in second]


def test_groups_without_advantage_and_void_episodes_are_left_out() -> None:
    rng = random.Random(1)

    def member(group: str, index: int, reward: float, **extra: object) -> Episode:
        turn = Turn(context_ids=(1, 2), observation="", completion=completion((3, 4, 5), rng, version=7))
        return episode(group, index, [turn], reward, **extra)  # type: ignore[arg-type]

    same = [member("same", k, 0.3) for k in range(4)]
    mixed = [member("mixed", k, float(k)) for k in range(3)] + [member("mixed", 3, 99.0, outcome="void")]
    gone = [member("gone", 0, 0.0, outcome="void")]
    items, summary = assemble(same + mixed + gone, Advantage(scale_by_std=False))
    assert [(item.group, item.advantage) for item in items] == [("mixed", -1.0), ("mixed", 0.0), ("mixed", 1.0)]
    assert (summary.num_groups, summary.num_groups_skipped, summary.num_episodes) == (3, 2, 7)
    assert summary.num_tokens == 21
    assert summary.reward_mean == pytest.approx((4 * 0.3 + 3) / 7)
    assert summary.oldest_versions == (7,) * 7


def test_what_infrastructure_cut_short_is_context_only() -> None:
    rng = random.Random(2)
    first = Turn(context_ids=(1,), observation="", completion=completion((2, 3), rng, finish="cancelled"))
    second = Turn(context_ids=(4, 5), observation="", completion=completion((6, 7), rng, finish="length"))
    item = trajectories(episode("g", 0, [first, second], 1.0), 0.5)[0]
    assert item.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert item.trained.tolist() == [False] * 5 + [True] * 2
    assert item.versions.tolist()[:5] == [-1] * 5
    masked: Trajectory = trajectories(episode("g", 0, [first, second], 1.0), 0.5, mask_truncated=True)[0]
    assert masked.num_trained == 0


def test_greedy_episodes_are_refused() -> None:
    rng = random.Random(3)
    turn = Turn(context_ids=(1,), observation="", completion=completion((2,), rng))
    with pytest.raises(RunError, match="temperature 0"):
        trajectories(episode("g", 0, [turn], 1.0, temperature=0.0), 1.0)[0]
