"""What people see while a run goes on, without a terminal and on one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shoal.cli import live
from shoal.cli.live import LiveView
from shoal.cli.training import Session
from shoal.config import config_from
from shoal.coordinator.admission import Admission
from shoal.coordinator.control import Control
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.service import Coordinator, Node
from shoal.protocol.work import Arrived, Fetching, StepReport
from tiny import FirstDigit, tiny_config


def session(tmp_path: Path, **changes: Any) -> Session:
    """A run that nobody is connected to."""
    config = config_from(tiny_config(tmp_path / "model", tmp_path / "runs", **changes))
    run = RunDir.create(tmp_path / "runs" / "tiny")
    control = Control(config, {"digit": FirstDigit(name="digit")}, run)
    coordinator = Coordinator(config, control, run, None, Admission.of(run))  # type: ignore[arg-type]
    return Session(config, run, coordinator, "shoal1TICKET", time.monotonic())


def join(shown: Session, name: str) -> Node:
    node = Node(name * 2, b"k" * 32, name, "worker", "cpu", joined_at=0.0, tokens_per_s=12.0)
    shown.coordinator.nodes[node.node_id] = node
    return node


def step(shown: Session, version: int) -> None:
    metrics = {"reward": 0.25 * version, "staleness_max": 1.0, "train_s": 2.0, "wait_s": 3.0}
    shown.coordinator.last_metrics = metrics
    shown.coordinator.control.stepped(StepReport(version=version, metrics=metrics), {})


def test_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = session(tmp_path)
    with LiveView() as view:
        view.ready(shown)
        join(shown, "ann")
        for version in (1, 1, 2):
            step(shown, version)
            view.update(shown)
        shown.coordinator.control.evals.results[0] = {"strict": 0.5, "lenient": 0.75, "questions": 16}
        view.update(shown)
        view.update(shown)
    said = capsys.readouterr()
    assert said.out == "", "standard output is for results"
    assert "shoal worker shoal1TICKET" in said.err
    assert said.err.count("step 1/4") == said.err.count("step 2/4") == 1
    assert "reward 0.250  staleness 1  train 2.0 s  wait 3.0 s  workers 1" in said.err
    assert said.err.count("version 0: 50.0% of 16 held-out questions right (75.0% counting any last number)") == 1


def test_quiet_says_little_but_how_to_join_a_run_without_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count, told in ((2, False), (0, True)):
        shown = session(tmp_path / str(count), workers__count=count)
        view = LiveView(quiet=True)
        view.ready(shown)
        step(shown, 1)
        view.update(shown)
        said = capsys.readouterr().err
        assert ("shoal1TICKET" in said) == ("waits until one joins" in said) == told
        assert "step 1" not in said


def test_a_run_without_workers_says_so_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "WAITING_HINT_S", 0.0)
    shown = session(tmp_path)
    view = LiveView()
    view.ready(shown)
    capsys.readouterr()
    hints = []
    for workers in (0, 0, 1, 1, 0, 0):
        shown.coordinator.nodes.clear()
        if workers:
            join(shown, "ann")
        time.sleep(0.002)
        view.update(shown)
        hints.append(capsys.readouterr().err.count("No worker is here; the run waits. Start one: shoal worker"))
    assert hints == [1, 0, 0, 0, 1, 0]


def test_the_panel_of_a_terminal(tmp_path: Path) -> None:
    shown = session(tmp_path)
    view = LiveView()
    node = join(shown, "ann")
    for version in (1, 2, 3):
        step(shown, version)
        view.update(shown)
    shown.coordinator.control.evals.results[0] = {"strict": 0.5, "lenient": 0.75, "questions": 16}
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    console.print(view._panel(shown))
    text = console.export_text()
    for words in ("step 3/4", "reward 0.750", "most 0 of 2", "v0: 50.0%", "ann", "12 tokens/s", "shoal: tiny"):
        assert words in text, words
    lines = [line.strip("│ ").split("  ")[0] for line in text.splitlines()]
    assert lines[2].startswith("step 3/4") and lines[3].startswith("train 2.0 s"), "one thing below the other"
    node.alive = False
    console.print(view._panel(shown))
    assert "none yet" in console.export_text()


def test_what_keeps_others_waiting_is_told_once_and_its_end_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = session(tmp_path)
    view = LiveView()
    node = join(shown, "ann")
    node.seen = time.monotonic() - 60
    for _ in range(3):
        view.update(shown)
    said = capsys.readouterr().err
    assert said.count("Waiting: ann silent for 60 s") == 1 and "No longer" not in said
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    console.print(view._panel(shown, shown.coordinator.watch.notices()))
    assert "ann silent for 60 s" in console.export_text()
    node.seen = time.monotonic()
    for _ in range(2):
        view.update(shown)
    assert capsys.readouterr().err.count("No longer: ann is silent") == 1
    LiveView(quiet=True).update(shown)
    assert capsys.readouterr().err == ""


def test_the_panel_shows_whence_versions_come(tmp_path: Path) -> None:
    shown = session(tmp_path)
    ann, bob = join(shown, "ann"), join(shown, "bob")
    ann.version, ann.fetching = 4, Fetching(version=5, bytes_done=300, bytes_total=1200)
    came = Arrived(version=4, seconds=1.25, by_source={bob.node_id: 700, "1234": 300})
    told = ann.came(came, shown.coordinator.name_of)
    assert told == {"name": "ann", "version": 4, "seconds": 1.25, "by_source": {"bob": 700, "1234": 300}}
    console = Console(width=120, record=True, file=(tmp_path / "screen").open("w"))
    console.print(LiveView()._panel(shown))
    text = console.export_text()
    assert "4 → 5 25%" in text and "bob 70%, 1234 30%, 1.2 s" in text
