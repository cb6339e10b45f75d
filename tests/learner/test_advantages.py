"""Advantage rules: their algebra, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.learner.advantages import Rewards, find_rule, group_advantages, grpo, is_uninformative

REWARDS = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=16).map(
    lambda values: np.array(values, dtype=np.float64)
)


@given(REWARDS, st.booleans(), st.floats(1e-6, 1.0))
def test_advantages_are_centred_and_ordered_like_the_rewards(rewards: Rewards, scale: bool, delta: float) -> None:
    advantages = grpo(rewards, scale_by_std=scale, delta=delta)
    assert abs(advantages.sum()) <= 1e-6 * max(1.0, np.abs(advantages).sum())
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(advantages[order]) >= 0).all()


@given(REWARDS)
def test_scaled_advantages_have_unit_deviation_up_to_delta(rewards: Rewards) -> None:
    delta = 1e-4
    advantages = grpo(rewards, delta=delta)
    if len(rewards) > 1 and np.ptp(rewards) > 0:
        std = rewards.std(ddof=1)
        assert advantages.std(ddof=1) == pytest.approx(std / (std + delta), rel=1e-6, abs=1e-9)


@given(st.floats(-1e6, 1e6), st.integers(1, 16), st.booleans())
def test_a_unanimous_group_has_exactly_zero_advantage(reward: float, size: int, scale: bool) -> None:
    advantages = grpo(np.full(size, reward), scale_by_std=scale)
    assert is_uninformative(advantages)
    assert (advantages == 0).all()


def test_known_values() -> None:
    rewards = np.array([0.0, 0.0, 0.0, 1.0])
    assert grpo(rewards, scale_by_std=False).tolist() == [-0.25, -0.25, -0.25, 0.75]
    assert grpo(rewards, delta=0.0) == pytest.approx([-0.5, -0.5, -0.5, 1.5])


def rank_rule(rewards: Rewards, *, scale_by_std: bool, delta: float) -> Rewards:
    """A user's own rule."""
    return np.argsort(np.argsort(rewards)).astype(np.float64) - (len(rewards) - 1) / 2


def broken_rule(rewards: Rewards, *, scale_by_std: bool, delta: float) -> Rewards:
    return np.full(len(rewards) + 1, np.nan)


def test_a_rule_by_import_path_is_used() -> None:
    rule = find_rule(f"{__name__}:rank_rule")
    assert group_advantages(np.array([3.0, 1.0, 2.0]), rule, scale_by_std=True, delta=0.1).tolist() == [1, -1, 0]


@pytest.mark.parametrize("name", ["nothing", "no.such.module:rule", f"{__name__}:absent", f"{__name__}:REWARDS_", ":x"])
def test_a_rule_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_rule(name)
    assert name in caught.value.problem
    assert "grpo" in caught.value.remedy


def test_a_rule_that_gives_nonsense_is_refused() -> None:
    rule = find_rule(f"{__name__}:broken_rule")
    with pytest.raises(ConfigError, match="one finite number"):
        group_advantages(np.array([1.0, 2.0]), rule, scale_by_std=True, delta=0.1)
