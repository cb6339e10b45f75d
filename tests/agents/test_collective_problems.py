"""Problems of two skills: their chains lead to their answers, and what is held out is never practised."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.collective.answers import canonical
from shoal.agents.collective.model import chain_schema, read_chain
from shoal.agents.collective.problems import (
    DIFFERENCES,
    ROMAN,
    SKILLS,
    SUMS,
    WORDS,
    Skill,
    SkillSettings,
    exercise,
    in_roman,
    in_words,
    problem,
    written,
)
from shoal.agents.tools.schema import Schema
from shoal.config import load_config
from shoal.envs.base import Split, parse_settings
from shoal.errors import TaskError
from shoal.protocol.episode import Task

SPLITS: tuple[Split, ...] = ("train", "heldout")
NUMBERS = st.integers(0, 10**15)


def from_roman(text: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in text]
    return sum(-one if one < after else one for one, after in zip(values, [*values[1:], 0], strict=True))


def done(requirement: str, task: str, needed: str) -> str:
    """A step as a slow expert that knows everything does it."""
    numbers = [int(digits) for digits in re.findall(r"\d+", task)]
    if needed:
        numbers.insert(0, int(needed))
    if requirement == SUMS:
        return str(numbers[0] + numbers[1])
    if requirement == DIFFERENCES:
        if task.startswith("Subtract"):
            numbers.reverse()
        return str(numbers[0] - numbers[1])
    return in_words(numbers[0]) if requirement == WORDS else in_roman(numbers[0])


@given(st.sampled_from(SPLITS), NUMBERS)
def test_a_chain_leads_to_the_answer_and_can_be_written(split: Split, number: int) -> None:
    made = problem(split, number)
    assert made == problem(split, number)
    result = ""
    for step in made.steps:
        result = done(step.requirement, step.task, result if step.needs else "")
    assert result == made.answer
    assert not any(skill.lower() in made.text.lower() for skill in (*SKILLS[:2], WORDS)), "nothing names a skill"
    assert read_chain(written(made)) == list(made.steps)
    assert not Schema(chain_schema(sorted(SKILLS)), "chain").problem(json.loads(written(made)))


@given(st.sampled_from(SKILLS), st.sampled_from(SPLITS), NUMBERS)
def test_an_exercise_has_its_answer(skill: str, split: Split, number: int) -> None:
    words, answer = exercise(skill, split, number)
    needed = re.search(r'as data: "(\d+)"\n(.*)', words)
    assert done(skill, needed[2] if needed else words, needed[1] if needed else "") == answer


def test_most_problems_need_two_skills_and_none_that_is_held_out_is_practised() -> None:
    made = [problem("heldout", number) for number in range(1000)]
    assert 0.5 < sum(len(one.steps) == 2 for one in made) / len(made) < 0.7
    practised = {exercise(skill, "train", number)[0] for skill in SKILLS for number in range(4000)}
    practised |= {problem("train", number).text for number in range(4000)}
    assert not practised & {one.text for one in made}
    assert not practised & {exercise(skill, "heldout", number)[0] for skill in SKILLS for number in range(300)}


def test_numbers_in_other_forms() -> None:
    assert len({in_words(n) for n in range(200)}) == 200 and in_words(121) == "one hundred twenty-one"
    assert [from_roman(in_roman(n)) for n in range(1, 200)] == list(range(1, 200))
    assert len({canonical(in_roman(n)) for n in range(1, 200)}) == 199


def test_the_recipe_of_every_skill_is_shipped(repository: Path) -> None:
    found = [load_config(path) for path in sorted((repository / "configs" / "collective").glob("*.toml"))]
    skills = [parse_settings(Skill.Settings, env.settings, "") for one in found for env in one.envs.values()]
    assert sorted(one.skill for one in skills if isinstance(one, SkillSettings)) == sorted(SKILLS)
    assert all(one.learner.lora is not None for one in found)


async def test_a_skill_is_an_environment() -> None:
    env = Skill(SkillSettings(skill=ROMAN), name="roman")
    task = env.task("heldout", 3, 0)
    answer = exercise(ROMAN, "heldout", int(task.id.partition("-")[2]))[1]
    assert (await env.score(task, [answer.lower()])).reward == 1.0
    assert (await env.score(task, ["I do not know"])).reward == 0.0
    whole = Skill(name="problems")
    made = problem("train", int(whole.task("train", 0, 1).id.partition("-")[2]))
    assert (await whole.score(whole.task("train", 0, 1), [made.answer])).reward == 1.0
    with pytest.raises(TaskError):
        await env.reset(Task(env="roman", id="other-1", seed=0))
