"""Experts that Shoal trained, as a collective, on problems of which more than half need two skills.

    examples ─▶ `shoal sft --lora-rank`: one adapter a skill, one for planning, one on the mixture ─▶ one engine
    held-out problems ─▶ collective, each expert alone, the mixture, self-consistency, a central scheduler ─▶ table

Everything is kept in a folder; what is there is not made again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

from _collective_answers import (
    AT_ONCE,
    TIMEOUT_S,
    Answers,
    Asked,
    Counted,
    Rows,
    asking,
    centrally,
    consistent,
    each,
    say,
    table,
    together,
)
from _collective_training import MIXTURE, PLANNER, PROMPT, slug, train
from shoal.agents.collective.answers import canonical, is_right
from shoal.agents.collective.baselines import direct
from shoal.agents.collective.experts import ExpertSettings, Opened
from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.problems import SKILLS, exercise, problem
from shoal.agents.collective.work import Expert
from shoal.cli.agent_join import opening
from shoal.cli.claimed import claim
from shoal.cli.solve import gathered
from shoal.protocol.episode import Task

SETTINGS = "experts.json"
ACTING_TEMPERATURE = 0.5
SLOTS = 16
CALIBRATIONS = 6
"""Exercises that each expert is set in each skill before problems come."""

EXERCISES = 100
"""Held-out ones with which each expert's own skill is measured."""

CALIBRATION_NUMBERS = 10**9
"""From here on exercises are for calibration."""


def experts(folder: Path, given: argparse.Namespace) -> tuple[Rows, dict[str, float]]:
    """The whole part."""
    claim(
        folder,
        SETTINGS,
        {"train_examples": given.train_examples, "model": given.model},
        resume=(folder / SETTINGS).exists(),
    )
    rows = train(folder, given)
    made = [(number, problem("heldout", number)) for number in range(given.test_problems)]
    problems = [Asked(n, one.text, one.answer, ("one_skill", "two_skills")[len(one.steps) > 1]) for n, one in made]
    found, skilled = asyncio.run(_solve(folder, given, problems))
    compared = table("experts", found, problems)
    chains = _kept(folder)
    return [*rows, *skilled, *compared, *chains], _headline(compared, found, problems, skilled, chains)


def _headline(
    compared: Rows, found: dict[str, Answers], problems: list[Asked], skilled: Rows, chains: Rows
) -> dict[str, float]:
    by_name = {row["method"]: row for row in compared}
    best = max((row for name, row in by_name.items() if name.startswith("alone-")), key=lambda row: row["right"])
    ours = found["collective"].found.values()
    headline: dict[str, float] = {
        "collective_right": by_name["collective"]["right"],
        "two_skill_share": statistics.mean(one.kind == "two_skills" for one in problems),
        "chains_finished": sum(row["finished"] for row in ours) / sum(row["chains"] for row in ours),
        "chains_parsed": sum(row["parsed"] for row in chains) / sum(row["written"] for row in chains),
        "best_expert_right": best["right"],
        "collective_minus_best_expert_low": best["collective_minus_interval"][0],
    }
    for name, key in (("mixture", "mixture"), ("mixture-consistency", "self_consistency"), ("central", "central")):
        headline[f"{key}_right"] = by_name[name]["right"]
        headline[f"collective_minus_{key}_low"] = by_name[name]["collective_minus_interval"][0]
    return headline | {f"skill_{row['expert']}": row["right"] for row in skilled}


def settings_of(folder: Path, model: str) -> list[ExpertSettings]:
    """The collective's experts, then what is asked directly."""
    lora = {name: str(folder / "sft" / name) for name in (*map(slug, SKILLS), PLANNER, MIXTURE)}
    brought = [
        ExpertSettings(
            name=slug(skill),
            model=model,
            lora=lora[slug(skill)],
            planner_lora=lora[PLANNER],
            prompt=PROMPT,
            slots=SLOTS,
            temperature=ACTING_TEMPERATURE,
            max_tokens=24,
        )
        for skill in SKILLS
    ]
    directly = [
        *((f"alone-{slug(skill)}", lora[slug(skill)], 0.0, 24) for skill in SKILLS),
        ("mixture", lora[MIXTURE], 0.0, 24),
        ("mixture-sampled", lora[MIXTURE], 0.7, 24),
        ("base-sampled", "", 0.7, 64),
    ]
    asked = [
        ExpertSettings(name=name, model=model, lora=one, prompt=PROMPT, temperature=heat, max_tokens=most)
        for name, one, heat, most in directly
    ]
    return [*brought, *asked]


async def _solve(folder: Path, given: argparse.Namespace, problems: list[Asked]) -> tuple[dict[str, Answers], Rows]:
    """Every method on every problem that it has not solved yet."""
    alone = [f"alone-{slug(skill)}" for skill in SKILLS]
    names = ["collective", "central", *alone, "mixture", "mixture-consistency", "base-consistency"]
    found = {name: Answers(folder / f"answers-{name}.jsonl") for name in names}
    async with opening(settings_of(folder, given.model), threads=given.threads) as ready:
        by_name = {one.settings.name: one.expert for one in ready}
        skilled = [await _skilled(by_name[f"alone-{slug(skill)}"], skill) for skill in SKILLS]
        for name in (*alone, "mixture"):
            await each(name, found[name], problems, asking(found[name], by_name[name]))
        if any(one.number not in found[name].found for name in ("collective", "central") for one in problems):
            writers = [Counted(one.writer) for one in ready[: len(SKILLS)] if one.writer is not None]
            brought = [Opened(one.settings, one.expert, writer) for one, writer in zip(ready, writers, strict=False)]
            try:
                async with gathered(brought) as node:
                    await _calibrated(node)
                    await each("collective", found["collective"], problems, together(node, found["collective"]))
                    await each("central", found["central"], problems, centrally(node, writers[0], found["central"]))
            finally:
                _keep(folder, writers)
        for name, sampled in (("mixture-consistency", "mixture-sampled"), ("base-consistency", "base-sampled")):
            await each(name, found[name], problems, consistent(found[name], by_name[sampled], found["collective"]))
    return found, skilled


async def _calibrated(node: CollectiveNode) -> None:
    """Each expert is set some exercises of each skill; nobody said who is good at what."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(key: bytes, skill: str, number: int) -> None:
        words, right = exercise(skill, "heldout", CALIBRATION_NUMBERS + number)
        task = Task(env="collective", id=f"{slug(skill)}-{number}", seed=0)

        def score(answer: str) -> float:
            return float(canonical(answer) == canonical(right))

        async with slots:
            await node.calibrate(key, skill, task, words, score, timeout_s=TIMEOUT_S)

    await asyncio.gather(
        *(one(key, skill, number) for key in node.peers() for skill in SKILLS for number in range(CALIBRATIONS))
    )
    say(f"calibrated: {len(node.peers())} experts by {CALIBRATIONS} exercises of each of {len(SKILLS)} skills")


async def _skilled(expert: Expert, skill: str) -> dict[str, Any]:
    """How good an expert is at its own skill."""
    made = [exercise(skill, "heldout", number) for number in range(EXERCISES)]
    tried = await asyncio.gather(*(direct(expert, words) for words, _ in made))
    right = statistics.mean(is_right(one.answer, answer) for one, (_, answer) in zip(tried, made, strict=True))
    say(f"{skill}: {right:.2f} of {EXERCISES} held-out exercises")
    return {"part": "skill", "expert": slug(skill), "exercises": EXERCISES, "right": right}


def _keep(folder: Path, writers: list[Counted]) -> None:
    """How many chains were written, and how many could be read, of this session."""
    row = {"written": sum(one.written for one in writers), "parsed": sum(one.parsed for one in writers)}
    with (folder / "chains.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _kept(folder: Path) -> Rows:
    return [{"part": "chains", **json.loads(line)} for line in (folder / "chains.jsonl").read_text().splitlines()]
