"""`shoal eval gaia`, as a user calls it; the model that decides is an endpoint of the test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_agent_command import deciding, run

from shoal.agents.gaia.evaluation import Answered
from shoal.cli.app import main
from shoal.cli.eval_gaia import summarise


def make_set(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        {"task_id": "a", "Question": "2 + 2?", "Level": 1, "Final answer": "4", "file_name": ""},
        {"task_id": "b", "Question": "Who leads?", "Level": 2, "Final answer": "Ida Lund", "file_name": "b.txt"},
        {"task_id": "c", "Question": "When?", "Level": 2, "Final answer": "1, 2"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.txt").write_text("Lead: Ida Lund")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_set_is_answered_scored_and_continued(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, out = make_set(tmp_path / "set"), tmp_path / "out"
    common = ("eval", "gaia", "--data", str(data), "--out", str(out), "--concurrency", "1")
    read = {"calls": [{"id": "r", "tool": "tools.read_document", "arguments": {"document": "b.txt"}}]}
    sum_ = {"calls": [{"id": "s", "tool": "tools.calculate", "arguments": {"expression": "2 + 2"}}]}
    builtin = ("--builtin", "calculator", "documents")
    prices = ("--usd-per-million-in", "100")
    # The third question finds nobody: what was answered stays, and the evaluation can be continued.
    with deciding(sum_, {"answer": "4.0"}, read, {"answer": "ida lund."}) as url:
        assert main([*common, "--endpoint", url, *builtin, *prices, "--json"]) != 0
    assert "could not be asked" in capsys.readouterr().out
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    settings = json.loads((out / "settings.json").read_text())
    with deciding({"answer": "2, 1"}) as url:
        settings["endpoint"] = url  # The test's endpoint has another port now.
        (out / "settings.json").write_text(json.dumps(settings))
        found = run(capsys, "eval", "gaia", "--resume", str(out))
    assert found["all"]["right"] == 2 and found["all"]["questions"] == 3 and found["all"]["calls"] == 2 / 3
    assert found["levels"]["level 1"]["success"] == 1.0 and found["levels"]["level 2"]["success"] == 0.5
    low, high = found["levels"]["level 2"]["interval"]
    assert 0 < low < 0.5 < high < 1
    assert found["all"]["usd"] == pytest.approx(5 * 10 * 100 / 1e6 / 3)
    answers = {one["task"]: one for one in map(json.loads, (out / "answers.jsonl").read_text().splitlines())}
    assert answers["b"]["answer"] == "ida lund." and answers["b"]["right"] and not answers["c"]["right"]
    assert main(["eval", "gaia", "--resume", str(out)]) == 0
    assert "66.7%" in capsys.readouterr().out
    assert "another evaluation" in run(capsys, *common, "--limit", "1", code=2)["error"]["problem"]


def test_what_cannot_be_asked_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    for arguments, words in (
        ((), "nothing to ask"),
        (("--data", str(tmp_path)), "no metadata.jsonl"),
        (("--data", str(data), "--level", "3"), "no question"),
        (("--data", str(data), "--questions", "zzz"), "zzz"),
        (("--resume", str(tmp_path)), "no evaluation"),
        (("--data", str(data), "--concurrency", "0"), "not between"),
    ):
        assert words in run(capsys, "eval", "gaia", *arguments, code=2)["error"]["problem"]


def test_levels_are_counted_apart_and_unscored_questions_not_at_all() -> None:
    def one(level: int, right: bool | None, **more: Any) -> Answered:
        fields: dict[str, Any] = {"task": f"t{level}{right}", "level": level, "answer": "x", "right": right, "run": "r"}
        fields |= {"reason": "", "seconds": 2.0, "tokens": 10, "usd": 0.5, "calls": 1, "decisions": 2}
        return Answered(**{**fields, **more})

    found = summarise([one(1, True), one(1, False), one(2, None, answer=None)])
    assert found["levels"]["level 1"]["success"] == 0.5 and found["all"]["scored"] == 2
    assert found["levels"]["level 2"]["scored"] == 0 and found["levels"]["level 2"]["interval"] == [0.0, 1.0]
    assert found["all"]["unanswered"] == 1 and found["all"]["seconds"] == 2.0
