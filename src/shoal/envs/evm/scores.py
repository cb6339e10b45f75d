"""The scores of an evaluation: by group, by split and in total, for both scorings, with intervals over rounds.

A round is every task once, each with an instance of its own. Its score is the sum over its tasks (10,700 at most with
all of them), a group's the mean over its tasks. What is reported is the mean over rounds ± t · s / √n, the 95 %
interval of Student's t with n - 1 degrees of freedom; one round has no interval.

Invariant: an episode that was void is in no sum. A round that lacks one is in no interval, and its other episodes
count for their tasks' means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from shoal.envs.evm.definition import COMPOSITE_GROUPS, FULL_POINTS, GROUPS
from shoal.envs.evm.evaluation import Played

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 to 10 degrees of freedom."""

Z_95 = 1.959964

SCORINGS = ("strict", "paper")
SPLITS = ("atomic", "composite", "total")


def t_95(degrees: int) -> float:
    """Student's t at 97.5 %; beyond the table by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5)."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z, n = Z_95, float(degrees)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def summarise(played: Sequence[Played], *, num_tasks: int, rounds: int) -> dict[str, Any]:
    """Everything that is printed of an evaluation."""
    by_split: dict[str, list[Played]] = {split: [] for split in SPLITS}
    by_group: dict[str, list[Played]] = {group: [] for group in GROUPS + COMPOSITE_GROUPS}
    for one in played:
        by_split["composite" if one.composite else "atomic"].append(one)
        by_split["total"].append(one)
        by_group[one.group].append(one)
    turns = [turn for one in played for turn in one.turns]
    acts = [act for turn in turns for act in turn.acts]
    return {
        "rounds": rounds,
        "tasks": num_tasks,
        "episodes": len(played),
        "missing": num_tasks * rounds - len(played),
        "maximum": num_tasks * FULL_POINTS,
        "splits": {split: _block(episodes, rounds, total=True) for split, episodes in by_split.items() if episodes},
        "groups": {group: _block(episodes, rounds, total=False) for group, episodes in by_group.items() if episodes},
        "understood": _mean([float(act.understood) for act in acts]),
        "tokens": sum(turn.tokens for turn in turns),
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
        "model_s": sum(turn.seconds for turn in turns),
    }


def _block(episodes: Sequence[Played], rounds: int, *, total: bool) -> dict[str, Any]:
    """One line of the table: sums over tasks, or means."""
    tasks = {one.task for one in episodes}
    scale = len(tasks) if total else 1
    block: dict[str, Any] = {"tasks": len(tasks), "maximum": FULL_POINTS * scale}
    for scoring in SCORINGS:
        block[scoring] = scale * _score(episodes, scoring)
        interval = _interval(episodes, rounds, len(tasks), scoring)
        block[f"{scoring}_interval"] = None if interval is None else [scale * end for end in interval]
    return block


def _score(episodes: Sequence[Played], scoring: str) -> float:
    """The mean over tasks of their episodes' mean."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for one in episodes:
        by_task[one.task].append(getattr(one, scoring))
    return _mean([_mean(scores) for scores in by_task.values()])


def _interval(episodes: Sequence[Played], rounds: int, num_tasks: int, scoring: str) -> tuple[float, float] | None:
    by_round: dict[int, list[Played]] = defaultdict(list)
    for one in episodes:
        by_round[one.round].append(one)
    scores = [_score(some, scoring) for number, some in by_round.items() if number < rounds and len(some) == num_tasks]
    if len(scores) < 2:
        return None
    mean = _mean(scores)
    spread = math.sqrt(sum((x - mean) ** 2 for x in scores) / (len(scores) - 1))
    half = t_95(len(scores) - 1) * spread / math.sqrt(len(scores))
    return max(0.0, mean - half), min(float(FULL_POINTS), mean + half)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
