"""What a worker claims, checked before it may train anything.

Tier 1 (`mismatch`): the episode is the leased one: id, group, index, task, worker, temperature, lengths, versions.
Tier 2 (`rescored`): the reward is what the coordinator's own copy of the environment gives for the same actions.

Not covered here: that the tokens were really drawn from the claimed policy, that `text` is what the tokens say, and
that the context's tokens are the task's prompt.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from shoal.envs.base import Environment
from shoal.errors import ShoalError
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease

REWARD_TOLERANCE = 1e-6
"""Rewards are sums of floats, the same on every machine up to this."""


class Limits(NamedTuple):
    """What no episode of the run exceeds."""

    context_tokens: int
    """Of a whole sequence, contexts and completions."""
    vocab_size: int
    """Every token id is below this."""


def mismatch(episode: Episode, lease: Lease, index: int, node_id: str, newest_version: int, limits: Limits) -> str:
    """Why this is not the leased episode, or an empty string.

    Args:
        node_id: who holds the lease.
        newest_version: no policy newer than this has been published.
    """
    if (episode.id, episode.group, episode.index) != (f"{lease.id}/{index}", lease.group, index):
        return "it is another episode than the leased one"
    if episode.task != lease.tasks[index]:
        return "its task is not the leased one"
    if episode.worker != node_id:
        return "it says that another worker acted"
    if episode.temperature != lease.params.temperature:
        return f"its temperature is {episode.temperature}, not {lease.params.temperature}"
    used = 0
    for turn in episode.turns:
        completion = turn.completion
        if not 1 <= len(completion.token_ids) <= lease.params.max_tokens:
            return f"a turn has {len(completion.token_ids)} tokens, not 1 to {lease.params.max_tokens}"
        if completion.finish not in ("stop", "length"):
            return f"a turn's sampling ended with '{completion.finish}'"
        low, high = min(completion.versions), max(completion.versions)
        if low < lease.min_version or high > newest_version or (lease.exact_version and high != lease.min_version):
            return f"its tokens are of versions {low} to {high}, which the lease does not allow"
        used += len(turn.context_ids) + len(completion.token_ids)
        if used > limits.context_tokens:
            return f"it is longer than the context of {limits.context_tokens} tokens"
        if max(*turn.context_ids, *completion.token_ids, 0) >= limits.vocab_size:
            return f"it has token ids beyond the vocabulary of {limits.vocab_size}"
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
    claimed = episode.reward_parts
    if claimed.keys() != step.info.keys() or any(
        not math.isclose(claimed[key], value, abs_tol=REWARD_TOLERANCE) for key, value in step.info.items()
    ):
        return "its reward's parts are not what the environment gives"
    return ""
