"""Advantages: how a group's rewards become one number for each of its rollouts.

1. The paper (DeepSeekMath, arXiv 2402.03300, section 4.1.2) does not say which standard deviation it means; like TRL
   and verl we take the unbiased one (n - 1).

A rule is a function `rule(rewards, *, scale_by_std, delta) -> advantages` of one group, float64 in and out. It is
named in the configuration, by a name below or as `package.module:function`. Invariants: advantages are finite and as
many as the rewards; a group whose rewards are all equal has advantages that are exactly zero, so that it can be
skipped before any compute.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError

Rewards = NDArray[np.float64]
AdvantageRule = Callable[..., Rewards]


def grpo(rewards: Rewards, *, scale_by_std: bool = True, delta: float = 1e-4) -> Rewards:
    """A_i = (r_i - mean) / (std + δ); without `scale_by_std`, A_i = r_i - mean (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards: one a rollout of the group.
        scale_by_std: divide by the group's standard deviation.
        delta: δ, which keeps a nearly unanimous group from exploding.
    """
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + delta) if scale_by_std else centred


RULES: dict[str, AdvantageRule] = {"grpo": grpo}


def find_rule(name: str) -> AdvantageRule:
    """The rule called `name`: one of `RULES`, or an import path `package.module:function`.

    Raises:
        ConfigError: there is no such rule.
    """
    if name in RULES:
        return RULES[name]
    module, colon, function = name.partition(":")
    known = f"Known: {', '.join(sorted(RULES))}; or give your own as package.module:function."
    if not colon:
        raise ConfigError(f"there is no advantage rule '{name}'.", known)
    try:
        rule = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the advantage rule '{name}' cannot be imported: {error}.", known) from None
    if not callable(rule):
        raise ConfigError(f"the advantage rule '{name}' is not a function.", known)
    return rule


def group_advantages(rewards: Rewards, rule: AdvantageRule, *, scale_by_std: bool, delta: float) -> Rewards:
    """Apply `rule` to one group and check what came back.

    Raises:
        ConfigError: a rule of the user's gave another number of advantages, or one that is not finite.
    """
    advantages = np.asarray(rule(rewards, scale_by_std=scale_by_std, delta=delta), dtype=np.float64)
    if advantages.shape != rewards.shape or not np.isfinite(advantages).all():
        raise ConfigError(
            f"the advantage rule gave {advantages.tolist()} for {len(rewards)} rewards.",
            "It must give one finite number for each reward.",
        )
    return advantages


def is_uninformative(advantages: Rewards) -> bool:
    """Whether a group teaches nothing: every advantage is exactly zero."""
    return not advantages.any()
