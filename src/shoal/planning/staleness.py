"""The staleness bound S: one inequality that admits, one that sweeps.

Words: the policy version rises by one a step; step t consumes R groups and makes version t + 1 from version t. A
rollout whose oldest token was drawn under version x has staleness t − x when step t consumes it.

*Sweep* (`is_fresh`): at the buffer's exit nothing with staleness > S passes. This alone is the guarantee.

*Admission* (`may_start`) keeps the sweep idle. Groups leave in the order they were started (up to the look-ahead), R a
step, so a group with `ahead` groups started before it and not yet swept, counting those already consumed, is consumed
at step t = ⌊ahead / R⌋. If none of its tokens is older than version x, its staleness is at most ⌊ahead / R⌋ − x, hence

    ⌊ahead / R⌋ ≤ x + S        ⟺        ahead < (x + S + 1) · R

(the form of AReaL's rate limiter, arXiv 2505.24298). Sweeping a group lowers `ahead` and so lets a replacement start.
With S = 0 it is the pull loop: version x's R groups may start, and no more until version x + 1 is out.
"""

from __future__ import annotations


def is_fresh(version: int, at_step: int, max_staleness: int) -> bool:
    """Whether a rollout whose oldest token is of `version` may be consumed by the step that starts from `at_step`."""
    return at_step - version <= max_staleness


def may_start(ahead: int, version: int, max_staleness: int, groups_per_step: int) -> bool:
    """Whether a group may start under `version` without being born stale.

    Args:
        ahead: groups consumed, buffered or running: all that were started before it and not swept.
    """
    return ahead < (version + max_staleness + 1) * groups_per_step
