"""What the families' folder says: one row a way of remembering, gains over the others with their intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from _memory_worlds import FAMILIES

RESAMPLES = 10_000


def summary(folder: Path, names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and headline of what the folder holds."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    won = 0
    for name in names:
        path = folder / name / "test.jsonl"
        if not path.exists():
            continue
        by_row: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for one in map(json.loads, path.read_text().splitlines()):
            by_row[one["row"]][one["task"]] = one
        for row, found in by_row.items():
            rewards = [one["reward"] for one in found.values()]
            low, high = interval(rewards)
            rows.append(
                {
                    "part": "families",
                    "case": f"{name}: {row}",
                    "count": len(found),
                    "reward": fmean(rewards),
                    "low": low,
                    "high": high,
                    "strict": fmean(one["strict"] for one in found.values()),
                    "prompt_tokens": fmean(one["prompt_tokens"] for one in found.values()),
                    "note_tokens": fmean(one["note_tokens"] for one in found.values()),
                }
            )
            headline[f"{name}_{row}"] = fmean(rewards)
        ours = by_row.get("sedm", {})
        lows = {}
        for other in ("none", "vector", "admission", "mem0"):
            both = sorted(ours.keys() & by_row.get(other, {}).keys())
            if both:
                gains = [ours[task]["reward"] - by_row[other][task]["reward"] for task in both]
                lows[other] = interval(gains)[0]
                headline[f"{name}_gain_over_{other}"] = fmean(gains)
                headline[f"{name}_gain_over_{other}_low"] = lows[other]
        if {"none", "vector"} <= lows.keys():
            tokens = {row: fmean(one["prompt_tokens"] for one in by_row[row].values()) for row in ("sedm", "vector")}
            headline[f"{name}_prompt_tokens_of_vector"] = tokens["sedm"] / tokens["vector"]
            helps = lows["none"] > 0 and lows["vector"] > 0 and tokens["sedm"] < tokens["vector"]
            if FAMILIES[name].origin:
                headline["transfers_that_help"] = headline.get("transfers_that_help", 0.0) + (lows["none"] > 0)
            else:
                won += helps
    headline["families_won"] = float(won)
    return rows, headline


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean, by resampling."""
    draw = np.random.default_rng(0)
    found = np.asarray(values)
    means = found[draw.integers(len(found), size=(RESAMPLES, len(found)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
