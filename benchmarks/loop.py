"""The whole loop on one machine: held-out answers by family before and after, over seeds, and without parts of it.

    shoal bench loop --json -- --seed 0 --folder runs/bench-loop                  seventy-five minutes; again: nothing
    shoal bench loop --json -- --seed 1 --folder runs/bench-loop --only whole     half an hour; sums both seeds
    shoal bench loop --json -- --folder runs/bench-loop --only sums               what there is, nothing run

`whole`          `shoal loop`, half an hour
`short`          the same in a quarter of an hour: what the next two are compared with
`no-memory`      a quarter of an hour without memory
`no-collective`  a quarter of an hour without the collective
`sums`           no run

Each is one run in `--folder`, named by seed and part. One that was interrupted is continued, one that has its report is
not run again, and the result is over all seeds that are finished there. `families_improved` counts families whose 95 %
interval is above 0 in every finished seed; `worst_family_points` is the lowest change of any family in any seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from shoal.coordinator.processes import child_of_this
from shoal.errors import RunError

from _common import benchmark, emit

WHOLE_MINUTES, SHORT_MINUTES = 30.0, 15.0
WITHOUT = {"whole": "", "short": "", "no-memory": "memory", "no-collective": "collective"}
PARTS = (*WITHOUT, "sums")

OVER = 2.0
"""A run that takes this many times its minutes, and `SPARE_S`, hangs."""

SPARE_S = 600.0
STOP_S = 60.0


def name_of(seed: int, part: str) -> str:
    """What a run is called."""
    return f"seed{seed}-{part}"


def play(folder: Path, seed: int, part: str, minutes: float, config: str, overrides: list[str]) -> None:
    """Run a part, or what is left of it."""
    run = folder / name_of(seed, part)
    if finished(run) is not None:
        say(f"{run.name}: done already")
        return
    words = ["loop", "--json"]
    if (run / "loop" / "state.json").exists():
        words += ["--resume", str(run)]
    else:
        words += [config, "--minutes", str(minutes), "--run.seed", str(seed), "--run.dir", str(folder)]
        words += ["--run.name", run.name, *(["--without", WITHOUT[part]] if WITHOUT[part] else []), *overrides]
    say(f"{run.name}: shoal {' '.join(words)}")
    command = [sys.executable, "-m", "shoal.cli", *words]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, **child_of_this()}
    ) as process:
        try:
            code = process.wait(OVER * 60 * minutes + SPARE_S)
        except BaseException as interruption:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if isinstance(interruption, subprocess.TimeoutExpired):
                raise RunError(f"{run} hangs.", "See its logs; the same command goes on.") from None
            raise
    if code:
        raise RunError(f"the loop in {run} ended with exit code {code}.", "See above; the same command goes on.")


def finished(run: Path) -> dict[str, Any] | None:
    """A run's report, where it has come to its end."""
    path = run / "report.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("finished") else None


def summed(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of all finished runs, and the numbers that matter."""
    rows: list[dict[str, Any]] = []
    by_part: dict[str, list[dict[str, Any]]] = {part: [] for part in WITHOUT}
    for part, reports in by_part.items():
        for run in sorted(folder.glob(f"seed*-{part}")):
            found = finished(run)
            if found is None:
                continue
            reports.append(found)
            families = [*found["families"], *([found["problems"]] if found.get("problems") else [])]
            for row in families:
                low, high = row["interval"]
                own = {"gain_points": 100 * row["gain"], "low_points": 100 * low, "high_points": 100 * high}
                same = {key: row[key] for key in ("family", "questions", "before", "after")}
                rows.append({"part": part, "seed": found["seed"], **same, **own})
    headline = _whole(by_part["whole"])
    short = _gain(by_part["short"])
    for part, key in (("no-memory", "memory_points"), ("no-collective", "collective_points")):
        without = _gain(by_part[part])
        if short is not None and without is not None:
            headline[key] = short - without
    return rows, headline


def _whole(reports: list[dict[str, Any]]) -> dict[str, float]:
    if not reports:
        return {"seeds": 0.0}
    by_family: dict[str, list[dict[str, Any]]] = {}
    for found in reports:
        for row in found["families"]:
            by_family.setdefault(row["family"], []).append(row)
    everywhere = {name: rows for name, rows in by_family.items() if len(rows) == len(reports)}
    improved = [name for name, rows in everywhere.items() if all(row["interval"][0] > 0 for row in rows)]
    serving = [found["serving"] for found in reports]
    return {
        "seeds": float(len(reports)),
        "families": float(len(by_family)),
        "families_improved": float(len(improved)),
        "worst_family_points": min(100 * r["gain"] for rows in by_family.values() for r in rows),
        "processes": float(min(found["processes"] for found in reports)),
        "requests": float(sum(one["requests"] for one in serving)),
        "requests_failed": float(sum(one["failed"] for one in serving)),
        "versions_served": float(min(one["versions"] for one in serving)),
        "memories_admitted": fmean(float(f.get("memories", {}).get("status", {}).get("active", 0)) for f in reports),
        "minutes": max(sum(found["seconds"].values()) / 60 for found in reports),
    }


def _gain(reports: list[dict[str, Any]]) -> float | None:
    """Mean change of all families, in points."""
    gains = [100 * row["gain"] for found in reports for row in found["families"]]
    return fmean(gains) if gains else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(WITHOUT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs: what is there is not run again")
    parser.add_argument("--config", default="loop")
    parser.add_argument("--whole-minutes", type=float, default=WHOLE_MINUTES)
    parser.add_argument("--short-minutes", type=float, default=SHORT_MINUTES, help="of the parts but `whole`")
    given, overrides = parser.parse_known_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for part in given.only:
        if part != "sums":
            minutes = given.whole_minutes if part == "whole" else given.short_minutes
            play(folder, given.seed, part, minutes, given.config, overrides)
    rows, headline = summed(folder)
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
