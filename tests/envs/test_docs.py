"""The environment that the documentation shows is a real one: it is extracted, imported, and played."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.envs.registry import ENVIRONMENTS, find, make
from shoal.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's Python block, saved as the module that the page names."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "backwards.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return str(code)


def test_it_takes_at_most_fifty_lines(example: str) -> None:
    assert example.count("\n") <= 50


async def test_it_plays(example: str) -> None:
    env = make("backwards:Backwards", {"letters": 5, "instruction": "Answer with one word."}, name="mine")
    task = env.task("train", 0, 0)
    assert task == env.fresh().task("train", 0, 0)
    opening = await env.reset(task)
    assert opening.messages[0].content == f'Spell "{task.id}" backwards. Answer with one word.'
    step = await env.step(f"It is:\n**{task.id[::-1]}**.")
    assert (step.reward, step.done) == (1.0, True)
    assert (await env.score(task, ["no idea"])).reward == 0
    heldout = {t.id for t in env.heldout(50)}
    assert len(heldout) == 50
    assert heldout.isdisjoint(env.task("train", i, 3).id for i in range(300))
    with pytest.raises(ConfigError, match="letters"):
        make("backwards:Backwards", {"leters": 5})


def test_the_table_names_every_environment_and_its_settings() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shared = set(find("shoal.envs.question:QuestionEnvironment").Settings.model_fields)
    for name in ENVIRONMENTS:
        assert f"| `{name}` |" in page
        row = page.split(f"| `{name}` |")[1].split("\n")[0]
        for key in set(find(name).Settings.model_fields) - shared:
            assert f"`{key}`" in row, f"docs/environments.md: the row of {name} lacks {key}"
