"""Training runs: started, watched, stopped, read. The run itself is processes of its own, as `shoal train` starts them.

Invariant: a run does not depend on who looks at it. It goes on when the notebook that started it has ended, and any
`Run` of its folder can stop it; the folder is all that there is to know.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shoal.errors import RunError

if TYPE_CHECKING:
    from shoal.api.swarm import Swarm
    from shoal.config import Config
    from shoal.coordinator.reporting.record import RunRecord
    from shoal.protocol.episode import Episode

POLL_S = 0.2
MAX_ERROR_BYTES = 1 << 16
INTERRUPTED = 130
"""Exit code of a run that was told to stop."""


class Run:
    """A training run, by its folder.

    Examples:
        ```python
        import shoal

        run = shoal.Run.start("arithmetic", {"run.steps": 20, "learner.lr": 2e-6})
        run.wait()
        print(run.summary["accuracy_before"], run.summary["accuracy_after"])
        print(shoal.Engine(run.model).chat("What is 7 + 8?").text)
        ```
    """

    def __init__(self, where: str | Path = "") -> None:
        """
        Args:
            where: its folder, or its name below `runs`; empty: the newest one there.

        Raises:
            RunError: there is none.
        """
        from shoal.cli.reach import find_target

        found = find_target(str(where)).folder
        if found is None:
            raise RunError("a ticket names no folder.", "Look at a run elsewhere by shoal.Swarm(ticket).")
        self._set(found)

    def _set(self, path: Path, started: _Started | None = None) -> None:
        self.path = path
        """Its folder."""
        self._started = started

    @classmethod
    def start(
        cls,
        config: str | Path,
        changes: Mapping[str, object] | None = None,
        *,
        workers: int | None = None,
        timeout_s: float = 600.0,
    ) -> Run:
        """Begin a run; gives it as soon as workers can join it.

        Args:
            config: a TOML file, or the name of a shipped configuration.
            changes: dotted keys to set: `{"learner.lr": 2e-6}`.
            workers: workers to start on this machine, instead of `workers.count`.
            timeout_s: the longest that beginning may take; the model may have to be fetched first.

        Raises:
            ConfigError: the configuration cannot be used.
            RunError: it ended before it began; the message says why.
        """
        from shoal.config import load_config

        overrides = [f"--{key}={_as_text(value)}" for key, value in (changes or {}).items()]
        if workers is not None:
            overrides.append(f"--workers.count={workers}")
        resolved = load_config(config, overrides)
        name = resolved.run.name or f"{Path(config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = (Path(resolved.run.dir) / name).resolve()
        if (folder / "config.toml").exists():
            raise RunError(f"there is a run in {folder} already.", "Give another run.name, or Run(...).resume().")
        return cls._begin(folder, [str(config), *overrides, f"--run.name={name}"], timeout_s)

    def resume(self, *, timeout_s: float = 600.0) -> Run:
        """Go on with a run that was stopped or killed."""
        if self.is_running:
            raise RunError(f"the run in {self.path} goes on already.")
        return self._begin(self.path, ["--resume", str(self.path)], timeout_s)

    @classmethod
    def _begin(cls, folder: Path, arguments: list[str], timeout_s: float) -> Run:
        ticket = folder / "ticket.txt"

        def written() -> int:
            return ticket.stat().st_mtime_ns if ticket.exists() else 0

        before = written()
        said = tempfile.TemporaryFile()  # noqa: SIM115  It is read when the run has ended.
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", "train", *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a notebook is not meant for it
        )
        deadline = time.monotonic() + timeout_s
        try:
            while written() == before and process.poll() is None:
                if time.monotonic() > deadline:
                    raise RunError(f"the run in {folder} did not begin within {timeout_s:.0f} s.", "Give it more time.")
                time.sleep(POLL_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        started = _Started(process, said)
        started.check()
        run = cls.__new__(cls)
        run._set(folder, started)  # Its folder may have gone again, where it could not begin: then `wait` says why.
        return run

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine works on it."""
        from shoal.cli.reach import running_process

        if self._started is not None:
            return self._started.process.poll() is None
        return running_process(self.path) is not None

    def wait(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for its end, and give its summary.

        Raises:
            TimeoutError: it goes on.
            RunError: it ended before its last step; the message says why.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_running:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the run in {self.path} goes on")
            time.sleep(POLL_S)
        if self._started is not None:
            self._started.check()
        return self.summary

    def stop(self, timeout_s: float = 60.0) -> None:
        """End it in order, whoever started it; it can be resumed.

        Raises:
            TimeoutError: it has not ended by then.
        """
        from shoal.cli.reach import running_process

        pid = self._started.process.pid if self._started is not None else running_process(self.path)
        if pid == 0:
            raise RunError("which process runs it cannot be told here.", "Stop it where it was started.")
        if not self.is_running or pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.is_running:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run in {self.path} has not ended")
            time.sleep(POLL_S)

    @property
    def config(self) -> Config:
        """Its resolved configuration."""
        from shoal.config import load_config

        return load_config(self.path / "config.toml")

    @property
    def record(self) -> RunRecord:
        """What it has left so far: steps, evaluations, events, summary."""
        from shoal.coordinator.reporting.record import read_run

        return read_run(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A table of the steps so far, a row each; for instance for `pandas.DataFrame`."""
        return [dict(point) for point in self.record.steps]

    @property
    def summary(self) -> dict[str, Any]:
        """What came of it; raises `RunError` while it has not ended."""
        found = self.record.summary
        if not found:
            raise RunError(f"the run in {self.path} has no summary yet.", "Wait for its end.")
        return found

    @property
    def model(self) -> Path:
        """The trained model's folder; raises `RunError` while there is none."""
        path = self.path / "model"
        if not (path / "config.json").is_file():
            raise RunError(f"the run in {self.path} has no model yet.", "Wait for its end.")
        return path

    def episodes(self, step: int) -> list[Episode]:
        """What optimizer step `step` (from 1) learnt from."""
        from shoal.protocol.codec import read_jsonl
        from shoal.protocol.episode import Episode

        file = self.path / "episodes" / f"{step - 1:06d}.jsonl"
        if not file.is_file():
            raise RunError(f"the run in {self.path} has no episodes of step {step}.", "See run.metrics for its steps.")
        return list(read_jsonl(file, Episode))

    @property
    def swarm(self) -> Swarm:
        """Who takes part in it; for a run that goes on."""
        from shoal.api.swarm import Swarm

        return Swarm(self.path)

    def report(self) -> Path:
        """Write its report, plots included, and give the page's path."""
        from shoal.coordinator.reporting.page import write_report

        return write_report(self.path)


def _as_text(value: object) -> str:
    """A value as an override has it: TOML, which for numbers, lists and texts is JSON."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


@dataclass(frozen=True)
class _Started:
    """A process that we started, and what it says."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def check(self) -> None:
        """Raise `RunError` where it has failed."""
        code = self.process.poll()
        if code == INTERRUPTED:
            raise RunError("the run was stopped before its last step.", "Continue it with resume().")
        if code:
            self.said.seek(0)
            try:
                error = json.loads(self.said.read(MAX_ERROR_BYTES))["error"]
                raise RunError(str(error["problem"]), str(error["remedy"]))
            except (ValueError, KeyError, TypeError):
                raise RunError(f"the run ended with exit code {code}.", "`shoal train` shows why.") from None
