"""A run's folder, read as it grows, resumed, damaged, or very long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console_cases import event, make_run, step, write_lines

from shoal.serving.console import episodes, runs
from shoal.serving.console.runs import MAX_EVENTS, RunFolder
from shoal.serving.console.tail import MAX_LINE_BYTES


def test_what_a_folder_tells(tmp_path: Path) -> None:
    folder = RunFolder(make_run(tmp_path / "run"))
    assert folder.read()
    assert not folder.read()
    state = folder.state
    assert (state.step, folder.steps_wanted, folder.staleness_bound) == (8, 8, 2)
    assert [point.mean for point in state.curves["reward"].points] == [n / 10 for n in range(1, 9)]
    assert (state.evals[8].strict, state.evals[8].questions) == (0.4, 40)
    assert state.staleness == {1: 24, 2: 8}
    assert state.rollouts["attic"] == 24
    assert state.fed["attic"] == {"learner": 4000, "cellar": 1000}
    assert state.kinds["process.died"] == 1
    assert not folder.has_ended
    assert state.num_damaged == 0


def test_it_grows(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    folder = RunFolder(path)
    folder.read()
    write_lines(path / "metrics.jsonl", [step(9)], "a")
    write_lines(path / "events.jsonl", [event("run.ended", version=9)], "a")
    (path / "summary.json").write_text(json.dumps({"usd": 1.5}))
    assert folder.read()
    assert folder.state.step == 9
    assert folder.has_ended
    assert folder.summary == {"usd": 1.5}


def test_a_step_that_is_repeated_counts_once(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    write_lines(path / "metrics.jsonl", [step(7, reward=0.0), step(8, reward=0.0), step(9)], "a")
    folder = RunFolder(path)
    folder.read()
    assert [point.mean for point in folder.state.curves["reward"].points][-3:] == [0.0, 0.0, 0.9]
    assert folder.state.rollouts["attic"] == 27


def test_damage_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"kind":"step","step":NaN}\nnot json\n{"kind":"step","step":9,"reward":NaN,"staleness/1":1e300}\n[[[\n'
        )
    with (path / "events.jsonl").open("ab") as file:
        file.write(b'{"kind":"x"}\n\xff\xfe\n')
    (path / "config.toml").write_text("[run\n")
    folder = RunFolder(path)
    folder.read()
    assert folder.state.step == 9
    assert folder.state.num_damaged == 5
    assert folder.steps_wanted == 0


def test_another_run_under_the_same_name(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    folder = RunFolder(path)
    folder.read()
    write_lines(path / "metrics.jsonl", [step(1, reward=0.5)])
    write_lines(path / "events.jsonl", [event("run.started")])
    assert folder.read()
    assert folder.state.step == 1
    assert folder.state.kinds == {"run.started": 1}


def test_a_folder_that_is_empty_or_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        folder = RunFolder(path)
        assert not folder.read()
        assert folder.state.step == 0
        assert folder.share_read == 1.0


def test_many_events_cost_a_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "READ_BYTES", 2 * MAX_LINE_BYTES)
    path = make_run(tmp_path / "run")
    write_lines(path / "events.jsonl", (event("lease.expired", f"node {n}", seconds=n) for n in range(40_000)))
    folder = RunFolder(path)
    looks = 0
    while folder.read() or folder.num_behind:
        looks += 1
    assert looks > 1, "it is read in pieces"
    assert folder.state.kinds == {"lease.expired": 40_000}
    assert len(folder.state.events) == MAX_EVENTS
    assert folder.state.events[-1].data == {"seconds": 39_999}


def test_episodes_are_listed_found_and_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with (path / "episodes" / "000007.jsonl").open("ab") as file:
        file.write(b"no episode\n{half")
    (path / "episodes" / "notes.txt").write_text("x")
    assert episodes.steps(path) == [7]
    assert [(one.index, one.reward, one.version) for one in episodes.listed(path, 7)] == [(0, 1.0, 3), (1, 1.0, 3)]
    assert [one.index for one in episodes.search(path, "YOUR CART")] == [1]
    assert episodes.search(path, "nowhere") == []
    found = episodes.episode(path, 7, 1)
    assert found is not None
    assert found.task.id == "cart-1"
    assert episodes.episode(path, 7, 2) is None
    assert episodes.episode(path, 8, 0) is None
    assert episodes.steps(tmp_path) == []
