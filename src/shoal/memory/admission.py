"""Whether a candidate helps: an anytime-valid test over replays, and false-discovery control over candidates.

Deviations from the paper:
1. Steps and tokens enter as relative differences, (B - A) / max(A, B, 1), so that S is bounded; S is divided by its
   bound, and every quantity below is in [-1, 1].
2. The paper compares one S with a threshold. Here S is a mean over trials on sibling tasks, and "its lower confidence
   bound is above 0" is a test that may be looked at after every trial.
3. It says nothing of many candidates; here e-LOND holds the false-discovery rate over a node's stream of candidates.

The test bets (Waudby-Smith and Ramdas, arXiv 2010.09686). For gains D_i in [-1, 1] and the hypothesis E[D] <= m:

    K(m) = mean over fractions c of  prod_i (1 + c (D_i - m) / (1 + m)),      0 < c < 1

is an e-process: at any stopping time P(K >= 1/level) <= level if the hypothesis holds. Fractions are mixed, not
adapted, so K depends on the set of trials alone: whoever holds the evidence gets the same value. K falls in m, so the
lower confidence bound is where K(m) = 1/level. Futility is the mirror test, of E[D] >= `worthwhile`.

e-LOND (Xu and Ramdas, arXiv 2311.06412): candidate t is admitted iff K >= 1/level, with
level = fdr * gamma_t * (discoveries + 1) and the sum of gamma_t at most 1. It needs e-values and no independence:
trials may share tasks and baseline runs, which LORD and SAFFRON do not allow for, and unlike e-BH it never takes an
admission back. t is fixed before the first trial; discoveries are those known when the candidate is decided: the proof
needs only that they are among the final ones.

Invariants: pure functions; `decide` depends on the set of gains, never on their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shoal.errors import RecordError
from shoal.memory.records import Entry, Trial, content_hash
from shoal.memory.screening import AnswerFinder

FRACTIONS = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95])
"""Stakes that are mixed: the best one for a mean gain g of variance v is about g/v."""

GAMMA_TOTAL = 2.1098
"""Sum over n >= 2 of 1 / (n ln^2 n), rounded up."""

BISECTIONS = 40


@dataclass(frozen=True)
class AdmissionPolicy:
    """How S is made and how sure one must be."""

    steps_price: float = 0.1
    """lambda_L: what running twice as long costs, in units of reward, at most."""
    tokens_price: float = 0.02
    """lambda_T, likewise for tokens."""
    reward_span: float = 1.0
    """Largest minus smallest reward of a task."""
    threshold: float = 0.05
    """eta: the mean gain that an admitted entry has at least."""
    worthwhile: float = 0.1
    """A mean gain below this is not worth more trials."""
    false_discovery_rate: float = 0.05
    futility_level: float = 0.05
    """How often an entry worth having is given up early, at most."""
    min_trials: int = 8
    max_trials: int = 500
    """Replay budget of one candidate; each trial is two runs."""

    def __post_init__(self) -> None:
        bounds = (
            self.steps_price >= 0 and self.tokens_price >= 0 and self.reward_span > 0,
            0 <= self.threshold < 1 and 0 < self.worthwhile < 1,
            0 < self.false_discovery_rate < 1 and 0 < self.futility_level < 1,
            1 <= self.min_trials <= self.max_trials,
        )
        if not all(bounds):
            raise RecordError("the admission policy has a value that is out of range.")


@dataclass(frozen=True)
class Decision:
    """What the evidence so far says; everything that an auditor recomputes."""

    verdict: Literal["accept", "reject", "continue"]
    reason: Literal["helps", "leak", "futile", "budget", "undecided"]
    num_trials: int
    mean: float
    """S over the counted trials."""
    log_e: float
    lower_bound: float
    """Of the mean gain, at `level`, valid whenever one looks."""
    level: float


def gain(trial: Trial, policy: AdmissionPolicy) -> float:
    """S = dR - lambda_L dL - lambda_T dT, B minus A, divided by its bound: in [-1, 1].

    Raises:
        RecordError: the rewards differ by more than `reward_span`.
    """
    reward = trial.with_memory.reward - trial.without.reward
    if abs(reward) > policy.reward_span * (1 + 1e-9):
        raise RecordError(f"the rewards of a trial differ by {reward:g}, and span {policy.reward_span:g} at most.")
    steps = _relative(trial.without.steps, trial.with_memory.steps)
    tokens = _relative(trial.without.tokens, trial.with_memory.tokens)
    bound = policy.reward_span + policy.steps_price + policy.tokens_price
    score = reward - policy.steps_price * steps - policy.tokens_price * tokens
    return min(1.0, max(-1.0, score / bound))


def _relative(before: int, after: int) -> float:
    return (after - before) / max(before, after, 1)


def log_e_value(gains: Sequence[float], null_mean: float = 0.0) -> float:
    """ln K(m): evidence against a mean gain of at most `null_mean` (in (-1, 1)); 0 without gains."""
    if not len(gains):
        return 0.0
    values, counts = np.unique(np.asarray(gains, dtype=np.float64), return_counts=True)
    wealth = np.log1p(np.outer(FRACTIONS, (values - null_mean) / (1 + null_mean))) @ counts
    top = float(wealth.max())
    return top + math.log(float(np.exp(wealth - top).mean()))


def lower_bound(gains: Sequence[float], level: float) -> float:
    """One-sided lower confidence bound of the mean gain, valid at any stopping time; -1 where nothing is known."""
    low, high = -1.0 + 1e-9, 1.0 - 1e-9
    needed = -math.log(level)
    if log_e_value(gains, low) < needed:
        return -1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_e_value(gains, middle) >= needed else (low, middle)
    return low


def discovery_level(candidate: int, discoveries: int, rate: float) -> float:
    """e-LOND's level of the `candidate`-th (from 1) with `discoveries` admissions known.

    gamma_t = 1 / (GAMMA_TOTAL (t + 1) ln^2 (t + 1)), whose sum over all t is at most 1.
    """
    if candidate < 1 or discoveries < 0:
        raise RecordError("a candidate's number is below 1, or there are fewer than no discoveries.")
    gamma = 1 / (GAMMA_TOTAL * (candidate + 1) * math.log(candidate + 1) ** 2)
    return min(1.0, rate * gamma * (discoveries + 1))


def distinct(trials: Iterable[Trial]) -> dict[str, Trial]:
    """Trials by id, in order of ids; of two reports of one trial that differ, the one with the smaller hash counts."""
    found: dict[str, Trial] = {}
    for trial in trials:
        known = found.get(trial.id)
        if known is None or content_hash("report", trial) < content_hash("report", known):
            found[trial.id] = trial
    return dict(sorted(found.items()))


def evidence(entry: Entry, trials: Iterable[Trial]) -> tuple[list[Trial], int]:
    """The trials that count for `entry`, and how many were left out because it holds their answer.

    Trials on the task it came from, or on another family's, are no evidence at all.
    """
    siblings = [t for t in distinct(trials).values() if t.task.id != entry.source_task and t.task.env == entry.family]
    finder = AnswerFinder(entry.text)
    clean = [t for t in siblings if not finder.holds(t.answers)]
    return clean, len(siblings) - len(clean)


def decide(gains: Sequence[float], *, level: float, policy: AdmissionPolicy, num_leaks: int = 0) -> Decision:
    """Accept, reject or ask for more.

    Args:
        gains: of the counted trials, in any order.
        level: this candidate's, from `discovery_level`.
        num_leaks: trials that did not count because the entry holds their answer.
    """
    count = len(gains)
    mean = math.fsum(gains) / count if count else 0.0
    log_e = log_e_value(gains)
    enough = count + num_leaks >= policy.min_trials

    def said(
        verdict: Literal["accept", "reject", "continue"],
        reason: Literal["helps", "leak", "futile", "budget", "undecided"],
    ) -> Decision:
        return Decision(verdict, reason, count, mean, log_e, lower_bound(gains, level), level)

    # Short answers are held by chance; a text that holds those of most siblings is a list of answers.
    if enough and num_leaks > count:
        return said("reject", "leak")
    if enough and log_e >= -math.log(level) and mean >= policy.threshold:
        return said("accept", "helps")
    if enough and log_e_value([-g for g in gains], -policy.worthwhile) >= -math.log(policy.futility_level):
        return said("reject", "futile")
    if count + num_leaks >= policy.max_trials:
        return said("reject", "budget")
    return said("continue", "undecided")
