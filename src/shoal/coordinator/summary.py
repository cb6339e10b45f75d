"""What people and machines want to know of a finished run: the content of `summary.json`."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from shoal.config import Config
from shoal.coordinator.control import Control
from shoal.coordinator.costs import by_machine, costs
from shoal.coordinator.reporting.paired import paired_interval

NUM_SAMPLES = 3


def local_name(number: int) -> str:
    """What a worker that the run itself started is called."""
    return f"local-{number}"


def summarise(config: Config, control: Control, *, seconds: float) -> dict[str, Any]:
    """What people and machines want to know of a finished run."""
    steps, now = config.run.steps, time.monotonic()
    rollouts = control.consumption.by_name
    if config.learner.mode != "colocated":
        for number in range(config.workers.count):
            rollouts[local_name(number)] += 0  # a worker that supplied nothing counts, too
    total = rollouts.total()
    summary: dict[str, Any] = {
        "steps": control.version,
        "seconds": round(seconds, 1),
        "max_staleness": control.consumption.max_staleness,
        "S": config.learner.max_staleness,
        "worker_rollouts": dict(rollouts),
        "min_worker_share": min(rollouts.values()) / total if total else 0.0,
        "rollouts": _counts(control),
        "capacity": control.provisioning.facts(now),
    }
    before, after = control.evals.answers(0), control.evals.answers(steps)
    if after:
        summary |= {"heldout_questions": len(after), **_accuracy(after, "after")}
    if before:
        summary |= _accuracy(before, "before")
    if before and after:
        for kind, suffix in (("strict", ""), ("lenient", "_lenient")):
            low, high = paired_interval([a[kind] >= 1 for a in before], [a[kind] >= 1 for a in after])
            summary[f"gain_interval{suffix}"] = [low, high]
        summary["samples"] = _samples(before, after)
    paid = costs(control, now)
    if paid:
        summary |= {**paid, "usd_by_machine": by_machine(control, now)}
    return summary


def _accuracy(answers: list[dict[str, Any]], when: str) -> dict[str, float]:
    return {
        f"accuracy_{when}": sum(a["strict"] for a in answers) / len(answers),
        f"accuracy_{when}_lenient": sum(a["lenient"] for a in answers) / len(answers),
    }


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few questions evenly spread over the held-out list, chosen by position and not by how they came out."""
    stride = max(1, len(before) // NUM_SAMPLES)
    return [
        {
            "question": b["question"],
            "before": b["answer"],
            "after": a["answer"],
            "correct_before": b["strict"],
            "correct_after": a["strict"],
        }
        for b, a in list(zip(before, after, strict=True))[::stride][:NUM_SAMPLES]
    ]


def _counts(control: Control) -> dict[str, int]:
    counts: Counter[str] = Counter(control.book.counts)
    counts["consumed_groups"] = control.queue.counts["consumed"]
    counts["swept_groups"] = control.queue.counts["swept"]
    if control.filtering.is_on:
        counts["filtered_groups"] = control.filtering.num_left_out  # of those that were swept
    return dict(counts)
