"""GSM8K and BIG-Bench Hard from `SHOAL_DATA`, whatever they show: one model as a collective, directly, and often.

    SHOAL_DATA/gsm8k/test.jsonl   {"question", "answer": "… #### 18"} a line   github.com/openai/grade-school-math
    SHOAL_DATA/bbh/TASK.json      {"examples": [{"input", "target"}]}          github.com/suzgunmirac/BIG-Bench-Hard

Three experts of one model (`shoal solve`'s own), three planners. Answers are kept in a folder, and not made again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from _collective_answers import Answers, Asked, Rows, asking, centrally, consistent, each, table, together
from shoal.agents.collective.experts import ExpertSettings
from shoal.cli.agent_join import opening
from shoal.cli.solve import default_experts, gathered
from shoal.envs.extract import after_marker
from shoal.errors import TaskError

from _common import need_data

METHODS = ("collective", "central", "direct", "consistency")
TOKENS = 256


def read(each_task: int) -> list[Asked]:
    """The first problems of each task that is there."""
    root = need_data(".")
    found: list[tuple[str, str, str]] = []
    grade_school = root / "gsm8k" / "test.jsonl"
    if grade_school.exists():
        for line in grade_school.read_text().splitlines()[:each_task]:
            row = json.loads(line)
            found.append(("gsm8k", row["question"], after_marker(row["answer"])))
    for path in sorted((root / "bbh").glob("*.json")):
        for row in json.loads(path.read_text())["examples"][:each_task]:
            found.append((f"bbh_{path.stem}", row["input"], row["target"]))
    if not found:
        raise TaskError(f"{root} holds neither gsm8k/test.jsonl nor bbh/*.json.", "Put one of them there.")
    return [Asked(number, text, truth, kind) for number, (kind, text, truth) in enumerate(found)]


def scores(folder: Path, given: argparse.Namespace) -> tuple[Rows, dict[str, float]]:
    """The whole part."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = read(given.test_problems)
    found = asyncio.run(_solve(folder, problems, given))
    rows = table("table", found, problems)
    return rows, {f"table_{row['method']}_right": row["right"] for row in rows}


async def _solve(folder: Path, problems: list[Asked], given: argparse.Namespace) -> dict[str, Answers]:
    found = {name: Answers(folder / f"table-{name}.jsonl") for name in METHODS}
    asked = [ExpertSettings(name=f"asked-{t}", model=given.model, temperature=t, max_tokens=TOKENS) for t in (0.0, 0.7)]
    experts = default_experts(given.model)
    async with opening([*experts, *asked], threads=given.threads) as ready:
        greedy, sampled = ready[len(experts) :]
        async with gathered(ready[: len(experts)]) as node:
            await each("collective", found["collective"], problems, together(node, found["collective"]))
            writer = ready[0].writer
            assert writer is not None, "these experts all plan"
            await each("central", found["central"], problems, centrally(node, writer, found["central"]))
        await each("direct", found["direct"], problems, asking(found["direct"], greedy.expert))
        consistently = consistent(found["consistency"], sampled.expert, found["collective"])
        await each("consistency", found["consistency"], problems, consistently)
    return found
