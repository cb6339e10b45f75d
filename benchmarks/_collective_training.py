"""Adapters for a collective, trained by `shoal sft`: one a skill, one for planning, one on the mixture of all.

The mixture gets as many tokens as experts and planner together: their exercises, and as many problems with their
answers as the planner's chains would have filled. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _collective_answers import Rows, say
from shoal.agents.collective.model import STEPS, WRITING, known
from shoal.agents.collective.problems import SKILLS, exercise, problem, written
from shoal.engine.source import resolve
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import RunError
from shoal.protocol.chat import Message
from shoal.rollout.host import model_cache

PLANNER, MIXTURE = "planner", "mixture"
PLANNING_SHARE = 0.35
"""Chains in the planner's examples, of the examples that a skill has: each is five times as long."""

PROMPT = "Reply with the result alone."
"""What experts, the mixture and the untrained model are told: short, as most tokens of an exercise are its frame."""

RANK, LR, BATCH = 16, 5e-4, 16


def slug(skill: str) -> str:
    """A skill as the name of a folder or expert."""
    return skill.replace(" ", "-")


def train(folder: Path, given: argparse.Namespace) -> Rows:
    """Make what is missing: examples, adapters. Gives what each was trained on."""
    tokenizer = Tokenizer(resolve(given.model, model_cache(), say).directory)
    files = {slug(skill): exercises(skill, given.train_examples) for skill in SKILLS}
    files[PLANNER] = chains(int(given.train_examples * PLANNING_SHARE))
    tokens = {name: sum(tokens_of(tokenizer, line) for line in lines) for name, lines in files.items()}
    files[MIXTURE] = mixture(tokenizer, [line for skill in SKILLS for line in files[slug(skill)]], sum(tokens.values()))
    tokens[MIXTURE] = sum(tokens_of(tokenizer, line) for line in files[MIXTURE])
    rows: Rows = []
    for name, lines in files.items():
        began = time.monotonic()
        fine_tune(folder, name, lines, given)
        row = {"part": "training", "adapter": name, "examples": len(lines), "tokens": tokens[name]}
        rows.append({**row, "seconds": time.monotonic() - began})
    return rows


def exercises(skill: str, count: int) -> list[dict[str, Any]]:
    """A skill's examples."""
    return [conversation(PROMPT, *exercise(skill, "train", number)) for number in range(count)]


def chains(count: int) -> list[dict[str, Any]]:
    """The planner's examples."""
    system = WRITING.format(steps=STEPS) + known(sorted(SKILLS))
    made = (problem("train", number) for number in range(count))
    return [conversation(system, one.text, written(one)) for one in made]


def mixture(tokenizer: Tokenizer, skills: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """All exercises, and problems with their answers until there are so many tokens."""
    lines = list(skills)
    left = tokens - sum(tokens_of(tokenizer, line) for line in lines)
    number = 0
    while left > 0:
        made = problem("train", number)
        lines.append(conversation(PROMPT, made.text, made.answer))
        left -= tokens_of(tokenizer, lines[-1])
        number += 1
    return lines


def conversation(system: str, asked: str, answer: str) -> dict[str, Any]:
    """One example of `shoal sft`."""
    said = [("system", system), ("user", asked), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def tokens_of(tokenizer: Tokenizer, line: dict[str, Any]) -> int:
    """Of one example, what is read and what is learnt."""
    *asked, answer = (Message(**message) for message in line["messages"])
    return len(tokenizer.prompt(asked)) + len(tokenizer.hf.encode(answer.content)) + 1


def fine_tune(folder: Path, name: str, lines: Iterable[dict[str, Any]], given: argparse.Namespace) -> None:
    """One adapter by `shoal sft`, from where it was left."""
    data, out = folder / "data" / f"{name}.jsonl", folder / "sft" / name
    if (out / "model" / "config.json").exists():
        return
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    say(f"training {name}")
    words = [
        given.model,
        str(data),
        "--out",
        str(out),
        "--lora-rank",
        str(RANK),
        "--lr",
        str(LR),
        "--warmup-steps",
        "10",
    ]
    words += [
        "--lr-schedule",
        "cosine",
        "--batch-size",
        str(BATCH),
        "--heldout",
        "0.02",
        "--threads",
        str(given.threads),
    ]
    words += ["--microbatch-tokens", "2048", "--max-tokens", "512", "--checkpoint-every", "50"]
    if (out / "sft.json").exists():
        words.append("--resume")
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cli", "sft", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
    )
    if done.returncode:
        raise RunError(f"the adapter {name} was not trained.", "Its output above says why; the same command goes on.")
