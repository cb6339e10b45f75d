"""`shoal evm`: what there is, one quest, a new task, and its test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.app import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["evm", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_all_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run(capsys, "tasks")["tasks"]) == 107


def test_one_instance_is_shown_with_its_solution(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "show", "wbnb_deposit", "--seed", "4")
    assert shown["points"] == 100
    (action,) = shown["reference"]
    assert json.loads(action)["function"] == "deposit()"
    assert shown == run(capsys, "show", "wbnb_deposit", "--seed", "4")


def test_a_new_task_passes_its_own_test_and_a_weakened_one_does_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "quests.toml"
    run(capsys, "new", "my_transfer", "--file", str(file))
    good = run(capsys, "selftest", "--file", str(file), "--seeds", "3")
    assert (good["tasks"], good["reference_min"], good["surviving_mutants"]) == (1, 100.0, 0)
    weak = (
        file.read_text()
        .replace("gain(USDT.balanceOf(to)) == amount", "ok()")
        .replace("transfer(to, amount))", "transfer(to, ANY))")
    )
    file.write_text(weak)
    bad = run(capsys, "selftest", "--file", str(file), "--seeds", "1", code=1)
    assert bad["surviving_mutants"] > 0 and bad["problems"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("show", "fly"), "fly"),
        (("new", "Not An Id", "--file", "x.toml"), "id"),
        (("selftest", "--file", "missing.toml"), "missing.toml"),
    ],
)
def test_mistakes_are_explained(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], word: str) -> None:
    assert word in run(capsys, *arguments, code=2)["error"]["problem"]


def test_an_existing_file_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("# mine")
    assert "exists" in run(capsys, "new", "a_task", "--file", str(file), code=2)["error"]["problem"]
    assert file.read_text() == "# mine"
