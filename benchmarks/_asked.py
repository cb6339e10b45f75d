"""Prompts: heads of GSM8K and HumanEval where `SHOAL_DATA` has them, otherwise questions of our own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from shoal.errors import TaskError

from _common import need_data

FILES = (("gsm8k_test.jsonl", "question"), ("humaneval.jsonl", "prompt"))
OWN = (
    "How many apples are left if Tom has {a} and gives {b} to each of his {c} friends?",
    "A train travels {a} km in {b} hours. How far does it travel in {c} hours?",
    "Write a Python function that returns the sum of {a}, {b} and {c}.",
    "Write a Python function that removes every {c}th item of a list of {a} items.",
    "Explain to a child of {b} why {a} is not a prime number.",
)


def questions(count: int) -> list[str]:
    """Our own."""
    stream = random.Random(0)
    return [
        OWN[n % len(OWN)].format(a=stream.randrange(20, 99), b=stream.randrange(3, 12), c=stream.randrange(2, 9))
        for n in range(count)
    ]


def prompts(count: int) -> tuple[str, list[str]]:
    """Where they come from, and the prompts: half of each file, from its beginning."""
    try:
        files = [_head(need_data(name), key, -(-count // len(FILES))) for name, key in FILES]
    except TaskError:
        return "own questions", questions(count)
    return "GSM8K and HumanEval", [text for pair in zip(*files, strict=True) for text in pair][:count]


def _head(path: Path, key: str, count: int) -> Sequence[str]:
    with path.open(encoding="utf-8") as lines:
        return [str(json.loads(line)[key]) for line, _ in zip(lines, range(count), strict=False)]
