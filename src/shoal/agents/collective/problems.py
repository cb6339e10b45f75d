"""Problems of which more than half need two skills, the steps that solve them, and each skill by itself.

    sums of numbers          12 + 19             What is 82 - 26? Write the answer in words.
    differences of numbers   82 - 26               1  differences of numbers   82 - 26               "56"
    numbers in words         56 → fifty-six        2  numbers in words         Write it in words.    "fifty-six"
    Roman numerals           56 → LVI

A problem carries no tag. As an environment (`Skill`) one skill, or the problems, can be trained by
reinforcement; as examples they are learnt by `shoal sft`.

    [envs.sums]
    type = "shoal.agents.collective.problems:Skill"
    settings = { skill = "sums of numbers" }

Invariants: everything is a function of its split and number; no pair of operands (in either order) and no number to be
written that is held out is trained on as a step of its own, and no problem that is held out begins with a trained pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

import msgspec
from pydantic import Field

from shoal.agents.collective.answers import canonical, is_right
from shoal.agents.collective.model import step_words
from shoal.agents.collective.work import PlannedStep, SubTask
from shoal.envs.base import EnvironmentSettings, Split, check_cursor, stable_fraction, stable_int
from shoal.envs.question import QuestionEnvironment, QuestionSettings
from shoal.errors import TaskError
from shoal.protocol.episode import Task

SUMS, DIFFERENCES, WORDS, ROMAN = "sums of numbers", "differences of numbers", "numbers in words", "Roman numerals"
SKILLS = (SUMS, DIFFERENCES, WORDS, ROMAN)

TWO_SKILLS = 0.6
"""The share of problems that need two."""

HELDOUT_SHARE = 0.2
MAX_DRAWS = 10_000

# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMERALS = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))

ASKED: dict[str, tuple[str, ...]] = {
    SUMS: ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
    DIFFERENCES: ("What is {a} - {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}."),
    WORDS: ("Write {a} in words.", "Spell out the number {a}."),
    ROMAN: ("Write {a} as a Roman numeral.", "What is {a} in Roman numerals?"),
}
"""A skill's problem in people's words."""

DONE: dict[str, str] = {
    SUMS: "{a} + {b}",
    DIFFERENCES: "{a} - {b}",
    WORDS: "Write {a} in words.",
    ROMAN: ASKED[ROMAN][0],
}
"""As the task of a first step."""

FOLLOWING: dict[str, str] = {SUMS: "Add {b} to it.", WORDS: "Write it in words.", ROMAN: "Write it as a Roman numeral."}
"""As the task of a step that needs a result."""

THEN: dict[str, tuple[str, ...]] = {
    SUMS: ("Then add {b}.", "Add {b} to the result."),
    WORDS: ("Write the answer in words.", "Give the result in words."),
    ROMAN: ("Write the answer as a Roman numeral.", "Answer with a Roman numeral."),
}
"""In a problem, behind another skill's."""


@dataclass(frozen=True)
class Problem:
    """A problem with its answer and the chain that solves it."""

    text: str
    answer: str
    steps: tuple[PlannedStep, ...]


def in_words(number: int) -> str:
    """A number below 200."""
    if number < 20:
        return ONES[number]
    if number >= 100:
        rest = number % 100
        return "one hundred" + (f" {in_words(rest)}" if rest else "")
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")


def in_roman(number: int) -> str:
    """A number from 1 on."""
    text = ""
    for value, numeral in NUMERALS:
        text += numeral * (number // value)
        number %= value
    return text


def result(skill: str, a: int, b: int = 0) -> str:
    """What a skill makes of its numbers."""
    return {SUMS: str(a + b), DIFFERENCES: str(a - b)}.get(skill) or (in_words(a) if skill == WORDS else in_roman(a))


def _operands(skill: str, draw: Random) -> tuple[int, int]:
    if skill == SUMS:
        return draw.randint(1, 120), draw.randint(1, 30)
    if skill == DIFFERENCES:
        return draw.randint(31, 120), draw.randint(1, 30)
    return draw.randint(1, 150), 0


def _is_held(skill: str, a: int, b: int) -> bool:
    return stable_fraction("composed", skill, *sorted((a, b))) < HELDOUT_SHARE


def _drawn(skill: str, split: Split, draw: Random) -> tuple[int, int]:
    """Numbers of this split."""
    for _ in range(MAX_DRAWS):
        a, b = _operands(skill, draw)
        if _is_held(skill, a, b) == (split == "heldout"):
            return a, b
    raise AssertionError("a fifth of all numbers is held out")


def problem(split: Split, number: int) -> Problem:
    """The problem `number` of a split."""
    draw = Random(stable_int("problem", split, number))
    two = draw.random() < TWO_SKILLS
    skill = draw.choice((SUMS, DIFFERENCES) if two else SKILLS)
    a, b = _drawn(skill, split, draw)
    text = draw.choice(ASKED[skill]).format(a=a, b=b)
    answer = result(skill, a, b)
    first = PlannedStep(skill, DONE[skill].format(a=a, b=b))
    if not two:
        return Problem(text, answer, (first,))
    then = draw.choice([other for other in FOLLOWING if other != skill])
    c = draw.randint(1, 30)
    last = result(then, int(answer), c)
    step = PlannedStep(then, FOLLOWING[then].format(b=c), (0,))
    return Problem(f"{text} {draw.choice(THEN[then]).format(b=c)}", last, (first, step))


def exercise(skill: str, split: Split, number: int) -> tuple[str, str]:
    """A skill by itself: words as its executor reads them, and the answer."""
    draw = Random(stable_int("exercise", skill, split, number))
    a, b = _drawn(skill, split, draw)
    follows = skill in FOLLOWING and draw.random() < 0.5
    if follows:
        words = step_words(SubTask(skill, FOLLOWING[skill].format(b=b), {0: str(a)}))
    else:
        words = draw.choice((DONE[skill], *ASKED[skill])).format(a=a, b=b)
    return words, result(skill, a, b)


def written(made: Problem) -> str:
    """The chain that solves a problem, as its planner writes it."""
    steps = [
        {"requirement": step.requirement, "task": step.task, "needs": [need + 1 for need in step.needs]}
        for step in made.steps
    ]
    return msgspec.json.encode({"steps": steps}).decode()


class SkillSettings(QuestionSettings):
    """What is asked."""

    skill: Literal["sums of numbers", "differences of numbers", "numbers in words", "Roman numerals", "problems"] = (
        Field(default="problems")
    )
    """One skill by itself, or the problems."""


class Skill(QuestionEnvironment):
    """One skill, or the problems, as questions."""

    Settings: ClassVar[type[EnvironmentSettings]] = SkillSettings
    settings: SkillSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        return Task(env=self.name, id=f"{split}-{stable_int('skill', split, seed, index) % 10**15}", seed=0)

    def question(self, task: Task) -> str:
        return self._made(task)[0]

    def grade(self, task: Task, reply: str) -> dict[str, float]:
        answer = self._made(task)[1]
        strict = float(canonical(reply) == canonical(answer))
        return {"strict": strict, "lenient": max(strict, float(is_right(reply, answer)))}

    def _made(self, task: Task) -> tuple[str, str]:
        side, _, digits = task.id.partition("-")
        if side not in ("train", "heldout") or not digits.isdecimal() or len(digits) > 20:
            raise TaskError(f"no such task: {task.id[:100]!r}.")
        split: Split = "train" if side == "train" else "heldout"
        if self.settings.skill == "problems":
            made = problem(split, int(digits))
            return made.text, made.answer
        return exercise(self.settings.skill, split, int(digits))
