"""GAIA: the scorer's rules, the public layout, and questions answered by runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from agent_cases import answer, call, plan
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.builtin.catalogue import Surroundings, builtin_tools
from shoal.agents.gaia.dataset import Asked, lay_out, read, write
from shoal.agents.gaia.evaluation import Answered, Manner, answer_all
from shoal.agents.gaia.scorer import is_right
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import PolicyError, ScriptedPolicy, View
from shoal.agents.scheduler.records import Budget, Decision
from shoal.agents.tools.toolbox import Callee
from shoal.errors import ConfigError, NetworkError, StorageError


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        # Numbers: units and thousands commas do not count, the value does.
        ("17", "17", True),
        ("17.0", "17", True),
        ("$1,234", "1234", True),
        ("89.5%", "89.5", True),
        ("about 17", "17", False),
        ("seventeen", "17", False),
        ("", "17", False),
        (None, "17", False),
        ("-3", "3", False),
        ("nonsense", "inf", False),
        # Texts: white space, upper case and punctuation do not count.
        ("Sea Gull", "seagull", True),
        ("St. Petersburg", "st petersburg", True),
        ("The Seagull", "seagull", False),
        ("$17", "seventeen", False),
        ("None", "none", True),
        (None, "None", True),
        # Lists: as many elements, in order; text in them keeps its punctuation.
        ("apples, pears, 3", "Apples,Pears,3", True),
        ("pears, apples, 3", "apples, pears, 3", False),
        ("apples, pears", "apples, pears, 3", False),
        ("1; 2; $3", "1;2;3", True),
        ("1, 2, 3", "1;2;3", True),
        ("a!, b", "a, b", False),
        ("1,234", "1,234", True),
        ("1234", "1,234", False),
    ],
)
def test_answers_are_compared_by_the_published_rules(said: str | None, right: str, same: bool) -> None:
    assert is_right(said, right) is same


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_answer_is_right_or_wrong_and_the_right_one_is_right(said: str, right: str) -> None:
    assert is_right(said, right) in (True, False)
    if "nan" not in right.lower():  # The one number that is not equal to itself.
        assert is_right(right, right)


@given(st.integers(-(10**12), 10**12))
def test_numbers_are_right_however_they_are_grouped(number: int) -> None:
    assert is_right(f"{number:,}", str(number)) and is_right(f" {number} ", str(number))
    assert not is_right(str(number + 1), str(number))


def make_set(folder: Path) -> None:
    lines = [
        {"task_id": "a", "Question": "2 + 2?", "Level": 1, "Final answer": "4", "file_name": ""},
        {"task_id": "b", "Question": "Who?", "Level": "2", "Final answer": "Ida Lund", "file_name": "b.txt"},
        {"task_id": "c", "Question": "What?", "Level": 3, "Final answer": "?", "Annotator Metadata": {"Steps": "1"}},
    ]
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.txt").write_text("Lead: Ida Lund")


def test_the_public_layout_is_read(tmp_path: Path) -> None:
    make_set(tmp_path / "2023" / "validation")
    first, second, third = read(tmp_path)
    assert (first.id, first.level, first.answer, first.file) == ("a", 1, "4", None)
    assert second.level == 2 and second.file is not None and lay_out(second, tmp_path / "b") == ["b.txt"]
    assert third.answer == "", "it is not published"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"task_id": "a", "Question": "q"}', "Level"),
        ('{"task_id": "", "Question": "q", "Level": 1}', "empty"),
        ('{"task_id": "a", "Question": "q", "Level": 99}', "between"),
        ('{"task_id": "a", "Question": "q", "Level": 1, "file_name": "../secret.txt"}', "no file"),
        ('{"task_id": "a", "Question": "q", "Level": 1, "file_name": "missing.pdf"}', "no file"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "secret.txt").write_text("s")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=words):
        read(folder)
    with pytest.raises(ConfigError, match="no metadata"):
        read(tmp_path / "nowhere")


def test_a_written_set_is_read_as_it_was(tmp_path: Path) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.csv"]
    for file in files:
        file.write_text(file.name)
    asked = [Asked("x", "Q?", 1, "4", None), Asked("y", "Q?", 2, "5", None), Asked("z", "Q?", 3, "", None)]
    write(tmp_path / "set", zip(asked, ([], files[:1], files), strict=True))
    found = read(tmp_path / "set")
    assert [(one.id, one.level, one.answer) for one in found] == [("x", 1, "4"), ("y", 2, "5"), ("z", 3, "")]
    assert [sorted(lay_out(one, tmp_path / one.id)) for one in found] == [[], ["y.txt"], ["one.txt", "two.csv"]]
    assert (tmp_path / "z" / "two.csv").read_text() == "two.csv"


def test_an_archive_leads_nowhere_else(tmp_path: Path) -> None:
    for name, content in (("escape.zip", "../outside.txt"), ("good.zip", "inner/a.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(content, "text")
    with pytest.raises(StorageError, match="leads out"):
        lay_out(Asked("e", "q", 1, "", tmp_path / "escape.zip"), tmp_path / "e")
    assert not (tmp_path / "outside.txt").exists()
    assert lay_out(Asked("g", "q", 1, "", tmp_path / "good.zip"), tmp_path / "g") == ["inner/a.txt"]
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(StorageError, match="cannot be unpacked"):
        lay_out(Asked("b", "q", 1, "", tmp_path / "bad.zip"), tmp_path / "b")


@asynccontextmanager
async def tools_for(folder: Path) -> AsyncIterator[Sequence[Callee]]:
    yield [*builtin_tools("documents", Surroundings(folder)), *builtin_tools("calculator")]


async def test_questions_are_answered_by_runs_with_their_files(tmp_path: Path) -> None:
    make_set(tmp_path / "set")

    def script(view: View) -> Decision:
        if "2 + 2" in view.task:
            return answer("4.0") if view.steps else plan(call("a", "calculate", expression="2 + 2"))
        if "Who" in view.task:
            assert "b.txt" in view.task
            if not view.steps:
                return plan(call("a", "read_document", document="b.txt"))
            return answer(view.value("a")["text"].partition(": ")[2])  # type: ignore[index]
        return plan(call("", "calculate", expression="1"))  # never answers

    kept: dict[str, Answered] = {}

    def keep(one: Answered) -> None:
        kept[one.task] = one

    log = EventLog(tmp_path / "runs.db")
    manner = Manner(Budget(steps=3), concurrency=2)
    await answer_all(read(tmp_path / "set"), log, lambda _: ScriptedPolicy(script), tools_for, manner, keep)
    log.close()
    assert kept["a"].right and kept["a"].calls == 1 and kept["a"].level == 1
    assert kept["b"].right and kept["b"].answer == "Ida Lund"
    assert kept["c"].right is None and kept["c"].answer is None and kept["c"].reason == "budget"


async def test_a_model_that_cannot_be_reached_answers_no_question(tmp_path: Path) -> None:
    make_set(tmp_path / "set")

    def script(_: View) -> Decision:
        raise PolicyError("nobody there")

    kept: list[Answered] = []
    log = EventLog(tmp_path / "runs.db")
    with pytest.raises(NetworkError, match="nobody there"):
        await answer_all(
            read(tmp_path / "set"), log, lambda _: ScriptedPolicy(script), tools_for, Manner(Budget()), kept.append
        )
    log.close()
    assert not kept
