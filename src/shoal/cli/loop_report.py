"""What came of a loop: one object for machines (`report.json`) and one page for people (`report.md`).

    families     held-out accuracy before and after, question by question paired, with its interval
    improved     families whose interval lies above 0          worst     the smallest change of all, in points

`after` is the loop's answer: with the notes that memory has for a question, where it has any; `alone` is the model's
without. Invariants: a question counts only where both sides answered it; numbers come from the loop's files alone, so a
report can be made anew at any time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from shoal.cli.loop_client import REQUESTS
from shoal.cli.loop_collective import PRACTICE
from shoal.cli.loop_state import LoopFolder, lines_of
from shoal.config import Config
from shoal.coordinator.reporting.paired import paired_interval
from shoal.coordinator.rundir import RunDir

Rows = list[dict[str, Any]]


def report(config: Config, folder: LoopFolder) -> dict[str, Any]:
    """Everything that a loop measured."""
    state = folder.state
    families = _families(folder)
    found: dict[str, Any] = {
        "run": str(folder.run),
        "seed": config.run.seed,
        "minutes": state.minutes,
        "seconds": {stage: round(seconds, 1) for stage, seconds in state.seconds.items()},
        "finished": state.stage == "done",
        "memory": state.memory,
        "collective": state.collective,
        "left_out": state.left_out,
        "processes": state.most_processes,
        "restarts": state.restarts,
        "families": families,
    }
    if families:
        found["families_improved"] = sum(row["interval"][0] > 0 for row in families)
        found["worst_family_points"] = min(100 * row["gain"] for row in families)
    if state.collective:
        found["problems"] = _problems(folder)
        found["practice"] = _practice(folder)
    found["training"] = _training(config, folder.run)
    found["serving"] = _serving(folder)
    if state.memory:
        found["memories"] = _memories(Path(config.memory.folder))
    return found


def write(config: Config, folder: LoopFolder) -> dict[str, Any]:
    """Both files, in the run's folder; gives the object."""
    import json

    found = report(config, folder)
    files = RunDir(folder.run)
    files.write_atomic("report.json", json.dumps(found, ensure_ascii=False, indent=1).encode())
    files.write_atomic("report.md", page(found).encode())
    return found


def _compared(name: str, before: list[bool], after: list[bool]) -> dict[str, Any]:
    low, high = paired_interval(before, after)
    return {
        "family": name,
        "questions": len(before),
        "before": fmean(before),
        "after": fmean(after),
        "gain": fmean(after) - fmean(before),
        "interval": [low, high],
    }


def _families(folder: LoopFolder) -> Rows:
    """Held-out accuracy of each environment, where both sides are there."""
    asked: dict[tuple[str, bool], dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for when in ("before", "after"):
        for line in folder.lines(f"{when}.jsonl"):
            if not line["void"]:
                asked[when, line["notes"]][line["family"], line["task"]] = line
    before, alone, noted = asked["before", False], asked["after", False], asked["after", True]
    rows = []
    for family in dict.fromkeys(family for family, _ in before):
        both = [key for key in before if key[0] == family and key in alone]
        if not both:
            continue
        was = [before[key]["strict"] >= 1 for key in both]
        now = [noted.get(key, alone[key])["strict"] >= 1 for key in both]
        own = [alone[key]["strict"] >= 1 for key in both]
        row = _compared(family, was, now)
        row |= {"after_alone": fmean(own), "noted": sum(key in noted for key in both)}
        row |= {
            "lenient_before": fmean(before[key]["lenient"] for key in both),
            "lenient_after": fmean(noted.get(key, alone[key])["lenient"] for key in both),
        }
        rows.append(row)
    return rows


def _problems(folder: LoopFolder) -> dict[str, Any] | None:
    """Held-out problems that the collective solved; None before both sides are there."""
    before, after = ({x["number"]: x for x in folder.lines(f"problems-{when}.jsonl")} for when in ("before", "after"))
    both = sorted(set(before) & set(after))
    if not both:
        return None
    found = _compared("collective", [before[n]["right"] for n in both], [after[n]["right"] for n in both])
    for when, lines in (("before", before), ("after", after)):
        found[f"answered_{when}"] = sum(lines[n]["answer"] is not None for n in both)
        found[f"seconds_{when}"] = fmean(lines[n]["seconds"] for n in both)
    return found


def _practice(folder: LoopFolder) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for line in folder.lines(PRACTICE):
        counts[line["what"]] += 1
        counts[f"{line['what']} right"] += bool(line.get("right"))
    return dict(counts)


def _training(config: Config, run: Path) -> dict[str, Any]:
    """Steps, and each environment's mean reward in the first and the last third of what was trained on."""
    rewards: dict[str, list[float]] = defaultdict(list)
    files = sorted((run / "episodes").glob("*.jsonl"))
    for file in files:
        for line in lines_of(file):
            rewards[line["task"]["env"]].append(float(line["reward"]))
    rows = {}
    for name, earned in sorted(rewards.items()):
        third = max(1, len(earned) // 3)
        rows[name] = {"episodes": len(earned), "first": fmean(earned[:third]), "last": fmean(earned[-third:])}
    kinds = Counter(line["kind"] for line in lines_of(run / "events.jsonl"))
    steps = [line for line in lines_of(run / "metrics.jsonl") if line["kind"] == "step"]
    return {
        "steps": len(files),
        "published": kinds["snapshot.published"],
        "staleness": config.learner.max_staleness,
        "step_seconds": (steps[-1]["time"] - steps[0]["time"]) / (len(steps) - 1) if len(steps) > 1 else None,
        "rewards": rows,
    }


def _serving(folder: LoopFolder) -> dict[str, Any]:
    lines = folder.lines(REQUESTS)
    times = [line["seconds"] for line in lines if line["status"] == 200]
    versions = [line["version"] for line in lines if "version" in line]
    return {
        "requests": len(lines),
        "failed": sum(line["status"] != 200 for line in lines),
        "versions": len(set(versions)),
        "went_back": sum(later < earlier for earlier, later in pairwise(versions)),
        "p95_seconds": quantiles(times, n=20)[-1] if len(times) > 1 else None,
    }


def _memories(where: Path) -> dict[str, Any]:
    from shoal.cli.memory_store import opened, shortened

    if not (where / "memory.db").exists():
        return {"status": {}, "trials": 0, "uses": 0, "admitted": []}
    with opened(where) as keeper:
        found = list(keeper.store.memories())
        trials = sum(len(keeper.store.trials(memory)) for memory in found)
    admitted = [memory for memory in found if memory.status == "active"]
    return {
        "status": dict(Counter(memory.status for memory in found)),
        "trials": trials,
        "uses": sum(memory.uses for memory in found),
        "admitted": [
            {"family": m.entry.family, "weight": m.weight, "uses": m.uses, "text": shortened(m.entry.text)}
            for m in sorted(admitted, key=lambda m: -m.weight)[:20]
        ],
    }


# For people


def page(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    name = Path(found["run"]).name
    minutes = sum(found["seconds"].values()) / 60
    lines = [f"# The loop: {name}", ""]
    if not found["finished"]:
        lines += ["**Not finished.** What is here so far:", ""]
    lines += [f"{minutes:.1f} minutes, seed {found['seed']}, up to {found['processes']} processes at once.", ""]
    if "families_improved" in found:
        lines += [
            f"{found['families_improved']} of {len(found['families'])} families improved (95 % interval above 0); the "
            f"worst change is {found['worst_family_points']:+.1f} points.",
            "",
            "| held out | questions | before | after | change, points (95 %) | the model alone | asked with notes |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [f"{_row(row)} {row['after_alone']:.1%} | {row['noted']} |" for row in found["families"]]
        if found.get("problems"):
            row = found["problems"]
            lines += [
                "",
                f"The collective solved {row['before']:.0%} of {row['questions']} held-out problems before and "
                f"{row['after']:.0%} after ({_change(row)} points); {row['seconds_before']:.0f} s and "
                f"{row['seconds_after']:.0f} s each.",
            ]
        lines += [""]
    lines += _happened(found)
    if found["left_out"]:
        lines += ["", "## Left out", "", *(f"- {part}: {why}" for part, why in found["left_out"].items())]
    lines += [
        "",
        "## Look closer",
        "",
        "```",
        f"shoal console {found['run']} --memory {found['run']}/loop/memory",
        f"shoal chat {found['run']}/model",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _change(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _row(row: dict[str, Any]) -> str:
    return f"| {row['family']} | {row['questions']} | {row['before']:.1%} | {row['after']:.1%} | {_change(row)} |"


def _happened(found: dict[str, Any]) -> list[str]:
    """What went on in between."""
    training, serving = found["training"], found["serving"]
    took = training["step_seconds"]
    lines = ["## What went on", "", f"- {training['steps']} steps" + (f", {took:.1f} s each" if took else "")]
    lines[-1] += f"; {training['published']} versions published, none staler than {training['staleness']} trained on."
    for name, row in training["rewards"].items():
        lines.append(
            f"- {name}: {row['episodes']} episodes trained on, mean reward {row['first']:.2f} in the first third, "
            f"{row['last']:.2f} in the last."
        )
    if serving["requests"]:
        slow = f", 95 % within {serving['p95_seconds']:.1f} s" if serving["p95_seconds"] else ""
        lines.append(
            f"- {serving['requests']} requests to the server meanwhile, {serving['failed']} failed, answered by "
            f"{serving['versions']} versions{slow}."
        )
    if "practice" in found:
        counted = found["practice"]
        lines.append(
            f"- The collective practised: {counted.get('exercise right', 0)} of {counted.get('exercise', 0)} exercises "
            f"and {counted.get('problem right', 0)} of {counted.get('problem', 0)} problems right."
        )
    if "memories" in found:
        of = found["memories"]
        status = ", ".join(f"{count} {name}" for name, count in sorted(of["status"].items())) or "none"
        lines.append(f"- Memories: {status}; {of['trials']} trials, {of['uses']} uses.")
        lines += [f"  - {m['family']}, weight {m['weight']:.2f}: {m['text']}" for m in of["admitted"]]
    lines += [f"- Process {name} was started again {times} times." for name, times in found["restarts"].items()]
    return lines
