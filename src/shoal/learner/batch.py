"""Episodes become trajectories: one token sequence each, with what the loss needs at every trained token.

A trajectory is the concatenation, turn by turn, of the context's and the completion's token ids; only completion
tokens are trained. Its prefix is the first context, which the rollouts of a group usually share.

An episode of several branches (`protocol.episode`) gives a trajectory for each. All carry the episode's advantage,
which comes from one reward an episode: an agent that asks more often does not weigh more in its group's mean. A turn
that several branches share is trained in the first of them and is context in the others.

Invariants: void episodes take no part, not even in a group's mean; every token of a finished completion of a `done`
episode is trained exactly once, or its whole group is skipped because no advantage in it differs from zero, which
leaves the loss of the step as it was; a completion cut short by infrastructure (`cancelled`, `error`) is read as
context and never trained.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.config.learner import Advantage
from shoal.errors import RunError
from shoal.learner.advantages import find_rule, group_advantages, is_uninformative
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import Grammar

UNTRAINED_FINISHES = ("cancelled", "error")
"""Ends of a completion that say nothing about the policy."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One rollout as arrays of the same length L (all tokens, in order)."""

    group: str
    token_ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    """Which tokens enter the loss."""
    behaviour: NDArray[np.float64]
    """log μ of each trained token, nan where nobody drew it (an expert's); 0 elsewhere."""
    versions: NDArray[np.int64]
    """Policy version each trained token was sampled under; -1 elsewhere."""
    prefix_length: int
    """Tokens of the first context."""
    advantage: float
    temperature: float
    episode_trained: int = 0
    """Trained tokens of the whole episode, all its branches together; 0 where this is all of it."""
    grammars: tuple[tuple[int, int, Grammar], ...] = ()
    """Of each trained completion that had to match one: where it starts, its length, and what it had to match."""

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())

    @property
    def sequence_trained(self) -> int:
        """What a normalisation by length divides by: branches are parts of one sequence, not several."""
        return self.episode_trained or self.num_trained


@dataclass(frozen=True)
class StepSummary:
    """What a step was given, skipped groups included."""

    num_groups: int
    num_groups_skipped: int
    num_episodes: int
    """Finished ones."""
    num_tokens: int
    """Trainable completion tokens."""
    reward_mean: float
    reward_std: float
    """Mean over groups of the standard deviation inside the group (n - 1)."""
    oldest_versions: tuple[int, ...]
    """Of each finished episode, the version of its oldest token."""


def trajectories(episode: Episode, advantage: float, *, mask_truncated: bool = False) -> list[Trajectory]:
    """The token sequences of one episode, one a branch; usually that is one.

    Args:
        mask_truncated: leave completions that hit the token limit out of the loss.

    Raises:
        RunError: the episode was sampled greedily, so its tokens have no log-probability to train on.
    """
    if episode.temperature <= 0:
        raise RunError(
            f"episode {episode.id} was sampled at temperature 0, which cannot be trained on.",
            "Set rollout.temperature above 0.",
        )
    untrained = (*UNTRAINED_FINISHES, "length") if mask_truncated else UNTRAINED_FINISHES
    done: set[int] = set()
    found = []
    for path in episode.branches:
        found.append(_branch(episode, path, advantage, untrained, done))
        done.update(path)
    if len(found) < 2:
        return found
    whole = sum(row.num_trained for row in found)
    return [replace(row, episode_trained=whole) for row in found]


def _branch(
    episode: Episode, path: Sequence[int], advantage: float, untrained: Sequence[str], done: Container[int]
) -> Trajectory:
    """One branch; the turns in `done` are trained in another."""
    ids: list[int] = []
    trained: list[bool] = []
    behaviour: list[float] = []
    versions: list[int] = []
    grammars: list[tuple[int, int, Grammar]] = []
    for number in path:
        turn = episode.turns[number]
        completion = turn.completion
        train = number not in done and completion.finish not in untrained
        num_context, num_drawn = len(turn.context_ids), len(completion.token_ids)
        ids += [*turn.context_ids, *completion.token_ids]
        if train and turn.grammar is not None:
            grammars.append((len(ids) - num_drawn, num_drawn, turn.grammar))
        trained += [False] * num_context + [train] * num_drawn
        mu = [math.nan] * num_drawn if turn.given else completion.logprobs
        behaviour += [0.0] * num_context + [*(mu if train else [0.0] * num_drawn)]
        versions += [-1] * num_context + [*(completion.versions if train else [-1] * num_drawn)]
    return Trajectory(
        group=episode.group,
        token_ids=np.array(ids, dtype=np.int64),
        trained=np.array(trained, dtype=np.bool_),
        behaviour=np.array(behaviour, dtype=np.float64),
        versions=np.array(versions, dtype=np.int64),
        prefix_length=len(episode.turns[path[0]].context_ids),
        advantage=advantage,
        temperature=episode.temperature,
        grammars=tuple(grammars),
    )


def fits(episode: Episode, vocab_size: int, context_tokens: int) -> bool:
    """Whether the model could have read and drawn these tokens at all; an episode comes from another machine."""
    parts = [ids for turn in episode.turns for ids in (turn.context_ids, turn.completion.token_ids)]
    return episode.longest <= context_tokens and all(max(ids, default=0) < vocab_size for ids in parts)


def assemble(
    episodes: Sequence[Episode], settings: Advantage, *, skip: bool = True, mask_truncated: bool = False
) -> tuple[list[Trajectory], StepSummary]:
    """All trajectories worth computing, grouped as given, and a summary of everything that came.

    Args:
        episodes: whole groups; order inside and between groups does not matter to the result.
        settings: the advantage rule.
        skip: leave out groups without advantage; false where a KL penalty gives them a gradient all the same.
        mask_truncated: see `trajectory`.
    """
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        members = groups.setdefault(episode.group, [])
        if episode.outcome == "done":
            members.append(episode)
    rule = find_rule(settings.type)
    kept: list[Trajectory] = []
    finished: list[Episode] = []
    stds: list[float] = []
    skipped = num_tokens = 0
    for members in groups.values():
        rewards = np.array([episode.reward for episode in members], dtype=np.float64)
        advantages = group_advantages(rewards, rule, scale_by_std=settings.scale_by_std, delta=settings.delta)
        rows = [
            row
            for episode, advantage in zip(members, advantages, strict=True)
            for row in trajectories(episode, float(advantage), mask_truncated=mask_truncated)
        ]
        finished += members
        num_tokens += sum(row.num_trained for row in rows)
        if len(rewards) > 1:
            stds.append(float(rewards.std(ddof=1)))
        if not members or (skip and is_uninformative(advantages)):
            skipped += 1
            continue
        kept += [row for row in rows if row.num_trained > 0]
    summary = StepSummary(
        num_groups=len(groups),
        num_groups_skipped=skipped,
        num_episodes=len(finished),
        num_tokens=num_tokens,
        reward_mean=float(np.mean([episode.reward for episode in finished])) if finished else 0.0,
        reward_std=float(np.mean(stds)) if stds else 0.0,
        oldest_versions=tuple(episode.version for episode in finished),
    )
    return kept, summary
