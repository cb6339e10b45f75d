"""What a worker claims, checked before it may train anything: the tiers that need neither weights nor tokenizer.

Tier 1 (`mismatch`): the episode is the leased one: id, group, index, task, worker, temperature, lengths, versions.
Tier 2 (`replay`): played again in the coordinator's own copy of the environment, the same actions meet the same
observations and grammars, and earn the same reward.

Not covered here: that the tokens were drawn from the claimed policy with the leased seed, that `text` is what the
tokens say, that the context's tokens are the prompt, that an episode ended where it had to: those are tiers 3 and 4
(`trust`, and `learner/claims`), which check the episodes of a worker as often as its standing asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shoal.envs.base import Environment
from shoal.errors import NetworkError, ShoalError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Grammar
from shoal.protocol.work import Lease

REWARD_TOLERANCE = 1e-6
"""Rewards are sums of floats, the same on every machine up to this."""

MOST_CHARS_A_TOKEN = 1024
"""No tokenizer's longest token says more; so a text is bounded by its tokens."""


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
    if episode.longest > limits.context_tokens:
        return f"it is longer than the context of {limits.context_tokens} tokens"
    for turn in episode.turns:
        completion = turn.completion
        # What the environment gives is as long as it is; that it was given is seen when it is played again.
        most = limits.context_tokens if turn.given else lease.params.max_tokens
        if not 1 <= len(completion.token_ids) <= most:
            return f"a turn has {len(completion.token_ids)} tokens, not 1 to {most}"
        if len(completion.text) > MOST_CHARS_A_TOKEN * len(completion.token_ids):
            return "a turn's text is longer than its tokens can say"
        if completion.finish not in ("stop", "length"):
            return f"a turn's sampling ended with '{completion.finish}'"
        low, high = completion.versions[0], completion.versions[-1]
        if sorted(completion.versions) != list(completion.versions):
            return "a turn's versions go back"
        if low < lease.min_version or high > newest_version or (lease.exact_version and high != lease.min_version):
            return f"its tokens are of versions {low} to {high}, which the lease does not allow"
        if max(*turn.context_ids, *completion.token_ids, 0) >= limits.vocab_size:
            return f"it has token ids beyond the vocabulary of {limits.vocab_size}"
    return ""


def cut_short(episode: Episode, lease: Lease, limits: Limits) -> str:
    """Why a turn cannot have been cut off by the token limit, or an empty string. Not for an agent's own program, which
    may ask for fewer tokens."""
    used = 0
    for number, (turn, parent) in enumerate(zip(episode.turns, episode.parents, strict=True)):
        if parent != number - 1:
            return "its turns are not one conversation"
        used += len(turn.context_ids)
        room, drawn = min(lease.params.max_tokens, limits.context_tokens - used), len(turn.completion.token_ids)
        if turn.completion.finish == "length" and drawn < room:
            return f"a turn says that it was cut off after {drawn} tokens, and had room for {room}"
        used += drawn
    return ""


class Replay(NamedTuple):
    """An episode as the coordinator's own environment plays it."""

    problem: str = ""
    """Why it is not what the worker claims, or nothing."""
    opening: tuple[Message, ...] = ()
    """The conversation that the environment opens with; none where an agent's own program does."""
    unfinished: str | None = None
    """What the environment said last, where the episode was not over then."""
    is_known: bool = True
    """False where what the environment needs did not answer: then nobody can say whether the claim is true."""


def is_played(env: Environment) -> bool:
    """Whether the environment itself asks and answers; in others an agent's own program does."""
    return type(env).judge is Environment.judge


async def verdicts(
    lease: Lease,
    episodes: Sequence[Episode],
    node_id: str,
    newest_version: int,
    limits: Limits,
    environments: Mapping[str, Environment],
) -> list[tuple[str, Replay]]:
    """What becomes of a submission's episodes by the first two tiers: accepted, rejected or void, and why."""
    found: list[tuple[str, Replay]] = []
    for index, episode in enumerate(episodes[: len(lease.tasks)]):
        if episode.outcome == "void":
            found.append(("void", Replay(episode.void_reason)))
            continue
        problem = mismatch(episode, lease, index, node_id, newest_version, limits)
        env = environments[lease.tasks[index].env]
        if not problem and is_played(env):
            problem = cut_short(episode, lease, limits)
        played = Replay(problem) if problem else await replay(episode, env)
        wrong = "rejected" if played.is_known else "void"
        found.append((wrong if played.problem else "accepted", played))
    return found


def is_whole(verdicts: Sequence[str], size: int) -> bool:
    """Whether all episodes of a lease came, and all are good.

    A group trains whole or not at all: who could keep back what it does not like would choose what is learnt.
    """
    return len(verdicts) == size and all(verdict == "accepted" for verdict in verdicts)


async def replay(episode: Episode, env: Environment) -> Replay:
    """Play an episode's actions again and compare what is said, what was asked for, and what is earned."""
    env = env.fresh()
    try:
        if not env.gives and any(turn.given for turn in episode.turns):
            return Replay("a turn is said to be given, and its environment gives none")
        if is_played(env):
            return await _replay(episode, env)
        step = await env.judge(episode)
        return Replay(_other_reward(episode, step.reward, step.info))
    except NetworkError as error:
        return Replay(f"it cannot be played again now: {error}", is_known=False)
    except ShoalError as error:
        return Replay(f"its actions cannot be replayed: {error}")
    finally:
        await env.close()


async def _replay(episode: Episode, env: Environment) -> Replay:
    task: Task = episode.task
    first = await env.reset(task)
    said, grammar, given, reward, done = first.messages[-1].content, first.grammar, first.given, 0.0, False
    info: Mapping[str, float] = {}
    for number, turn in enumerate(episode.turns, start=1):
        if done:
            return Replay(f"its actions cannot be replayed: it goes on after its end at action {number - 1}")
        if turn.given != (given is not None) or (turn.given and turn.completion.text != given):
            return Replay("a turn was not given as its environment gives it")
        if problem := _other_turn(turn, said, grammar):
            return Replay(problem)
        step = await env.step(turn.completion.text, truncated=turn.completion.finish == "length")
        said, grammar, given, done, info = step.observation, step.grammar, step.given, step.done, step.info
        reward += step.reward
    if problem := _other_reward(episode, reward, info):
        return Replay(problem)
    return Replay("", first.messages, None if done else said)


def _other_reward(episode: Episode, reward: float, info: Mapping[str, float]) -> str:
    """Why the claimed reward is wrong, or an empty string."""
    if not math.isclose(reward, episode.reward, abs_tol=REWARD_TOLERANCE):
        return f"it claims reward {episode.reward:g}, and the environment gives {reward:g}"
    claimed = episode.reward_parts
    if claimed.keys() != info.keys() or any(
        not math.isclose(claimed[key], value, abs_tol=REWARD_TOLERANCE) for key, value in info.items()
    ):
        return "its reward's parts are not what the environment gives"
    return ""


def _other_turn(turn: Turn, said: str, grammar: Grammar | None) -> str:
    """Why a turn is not the answer to what the environment said, or an empty string."""
    if turn.grammar != grammar:
        return "a turn was not constrained by the grammar that its environment gives"
    if turn.observation != said:
        return "a turn answers another observation than its environment gives"
    return ""
