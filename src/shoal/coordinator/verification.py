"""What a worker claims, checked before it may train anything.

Tier 1 (`mismatch`): the episode is the leased one: id, group, index, task, temperature, token limits, versions.
Tier 2 (`rescored`): the reward is what the coordinator's own copy of the environment gives for the same actions.

Not covered here: that the tokens were really drawn from the claimed policy, and that `text` is what the tokens say.
"""

from __future__ import annotations

import math

from shoal.envs.base import Environment
from shoal.errors import ShoalError
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease

REWARD_TOLERANCE = 1e-6
"""Rewards are sums of floats, the same on every machine up to this."""


def mismatch(episode: Episode, lease: Lease, index: int, newest_version: int) -> str:
    """Why this is not the leased episode, or an empty string.

    Args:
        newest_version: no policy newer than this has been published.
    """
    if (episode.id, episode.group, episode.index) != (f"{lease.id}/{index}", lease.group, index):
        return "it is another episode than the leased one"
    if episode.task != lease.tasks[index]:
        return "its task is not the leased one"
    if episode.temperature != lease.params.temperature:
        return f"its temperature is {episode.temperature}, not {lease.params.temperature}"
    for turn in episode.turns:
        completion = turn.completion
        if not 1 <= len(completion.token_ids) <= lease.params.max_tokens:
            return f"a turn has {len(completion.token_ids)} tokens, not 1 to {lease.params.max_tokens}"
        low, high = min(completion.versions), max(completion.versions)
        if low < lease.min_version or high > newest_version or (lease.exact_version and high != lease.min_version):
            return f"its tokens are of versions {low} to {high}, which the lease does not allow"
    return ""


async def rescored(episode: Episode, env: Environment) -> str:
    """Why the claimed reward is wrong, or an empty string."""
    actions = [turn.completion.text for turn in episode.turns]
    truncated = [turn.completion.finish == "length" for turn in episode.turns]
    try:
        step = await env.fresh().score(episode.task, actions, truncated=truncated)
    except ShoalError as error:
        return f"its actions cannot be replayed: {error}"
    if not math.isclose(step.reward, episode.reward, abs_tol=REWARD_TOLERANCE):
        return f"it claims reward {episode.reward:g}, and the environment gives {step.reward:g}"
    claimed = {key: episode.reward_parts.get(key, math.nan) for key in step.info}
    if any(not math.isclose(claimed[key], value, abs_tol=REWARD_TOLERANCE) for key, value in step.info.items()):
        return "its reward's parts are not what the environment gives"
    return ""
