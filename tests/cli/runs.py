"""Whole runs as users start them: processes on loopback, looked at from outside through what they write."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.coordinator.audit import audit
from shoal.coordinator.journal import JOURNAL, Entry
from shoal.protocol.codec import from_json
from shoal.protocol.episode import Episode
from tiny import tiny_config, tiny_model, write_config

__all__ = ["tiny_model"]

TESTS = Path(__file__).parents[1]
SHOAL = [sys.executable, "-m", "shoal.cli"]

PATIENCE_S = 90.0
"""The longest that any one thing may take on a busy machine; nothing is judged by how long it took."""


class Process:
    """One `shoal` command, its output in files."""

    def __init__(self, arguments: list[str], home: Path, cwd: Path, prefix: tuple[str, ...] = (), **env: str) -> None:
        self.out = home.parent / f"{home.name}-{time.monotonic_ns()}.out"
        self.err = self.out.with_suffix(".err")
        environment = {
            **os.environ,
            "SHOAL_HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]]),
            "NO_COLOR": "1",
            "COLUMNS": "100",
            **env,
        }
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, *SHOAL, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """What it has written to standard error so far."""
        return self.err.read_text()

    @property
    def result(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        return dict(json.loads(self.out.read_text()))

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process.args} did not end. It said:\n{self.said}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Runs:
    """Starts commands in a directory of its own, and ends whatever is left of them."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        self.model = model
        self.home = path / "home"
        self.started: list[Process] = []

    def config(self, **changes: Any) -> Path:
        return write_config(self.path / "tiny.toml", tiny_config(self.model, self.path / "runs", **changes))

    @property
    def run(self) -> Run:
        return Run(self.path / "runs" / "tiny")

    def shoal(
        self, *arguments: str | Path, cwd: Path | None = None, prefix: tuple[str, ...] = (), **env: str
    ) -> Process:
        made = Process([str(a) for a in arguments], self.home, cwd or self.path, prefix, **env)
        self.started.append(made)
        return made

    def train(self, *arguments: str, **changes: Any) -> Process:
        """`shoal train` of the tiny run."""
        return self.shoal("train", self.config(**changes), "--json", *arguments)

    def close(self) -> None:
        for process in self.started:
            process.end()
        for pid in processes_of(self.path):
            os.kill(pid, signal.SIGKILL)


class Run:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self._lines("metrics.jsonl") if line["kind"] == "step"]

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [line for line in self._lines("metrics.jsonl") if line["kind"] == "eval"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e["data"] | {"node": e["node"]} for e in self._lines("events.jsonl") if e["kind"] == kind]

    @property
    def ticket(self) -> str:
        return (self.path / "ticket.txt").read_text().strip()

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "summary.json").read_text()))

    def episodes(self) -> dict[int, list[Episode]]:
        """By the step that consumed them: version -> episodes."""
        return {
            int(path.stem): [from_json(line, Episode) for line in path.read_bytes().splitlines()]
            for path in sorted((self.path / "episodes").glob("*.jsonl"))
        }

    def journal(self) -> list[Entry]:
        lines = (self.path / JOURNAL).read_bytes().splitlines(keepends=True)
        return [from_json(line, Entry) for line in lines if line.endswith(b"\n")]

    def running(self) -> set[int]:
        """Groups that workers are acting on."""
        last = {number: entry.what for entry in self.journal() for number in entry.numbers}
        return {number for number, what in last.items() if what == "start"}

    def acknowledged(self) -> set[str]:
        """Groups that workers were told are accepted."""
        return set(re.findall(r"group (g\d+): \d+ accepted$", self.logs(), re.MULTILINE))

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted((self.path / "logs").glob("*.log")))

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def check(self, *, steps: int, groups: int = 3, size: int = 4, staleness: int = 2) -> None:
        """What holds of every finished run, whatever happened to it on the way."""
        assert [line["step"] for line in self.steps] == list(range(1, steps + 1)), "each step once, in order"
        episodes = self.episodes()
        assert sorted(episodes) == list(range(steps))
        found = audit(self.path, max_staleness=staleness, acknowledged=self.acknowledged())
        assert found.good, found.problems
        trained = Counter(e.group for batch in episodes.values() for e in batch)
        assert set(trained.values()) == {size} and len(trained) == steps * groups == found.consumed, "whole groups"
        for batch in episodes.values():
            assert len(batch) == groups * size
            assert all(e.outcome == "done" for e in batch)
        assert self.summary["steps"] == steps and self.summary["max_staleness"] <= staleness
        assert sum(self.summary["worker_rollouts"].values()) == steps * groups * size
        assert processes_of(self.path) == [], "no process is left"


def processes_of(path: Path) -> list[int]:
    """Live processes whose command line names something below `path`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(path).encode() in command and state != "Z":
                found.append(int(entry.name))
    return found


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def child(pid: int, word: str) -> int | None:
    """The child of `pid` that has this word in its command line."""
    for found in children_of(pid):
        if word in Path(f"/proc/{found}/cmdline").read_text().split("\0"):
            return found
    return None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], Any], process: Process | None = None, run: Run | None = None) -> Any:
    """Wait until something is true and give it; fail with what the process said if it ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        ended = process is not None and process.process.poll() is not None
        if ended and not condition():
            pytest.fail(f"{process.process.args} ended early:\n{process.said}\n{run.logs() if run else ''}")
        if time.monotonic() > deadline:
            said = process.said if process else ""
            pytest.fail(f"what was waited for did not happen. {said}\n{run.logs() if run else ''}")
        time.sleep(0.05)
    return found


@pytest.fixture
def runs(tmp_path: Path, tiny_model: Path) -> Iterator[Runs]:
    """Starts runs of the tiny model; nothing that they started outlives the test."""
    made = Runs(tmp_path, tiny_model)
    yield made
    made.close()
