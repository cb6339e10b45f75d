"""Is anything lost, trained twice or trained too late when learner, coordinator and workers are killed again and again?

One asynchronous run of a tiny model with two workers, real processes on loopback. At random moments (drawn from a
seed; half of them counted from the last kill, so also while a process starts, half from the next step that is done)
one of them gets SIGKILL, or all at once. A killed learner or worker is started again by the run itself; a killed
coordinator's children must end by themselves, and `shoal train --resume` goes on. After every kill of the coordinator,
and at the end, the run's folder is audited (`shoal debug audit`), and what workers were told is accepted must be there.

    lost, duplicated, staleness_violations, disorder    what the last audit counts; the journal holds all of the run
    orphans                                             children alive 15 s after their coordinator's kill
    leasing_p50_s, leasing_max_s                        from `--resume` to the first group handed to a worker

Some eight minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _nat import SHOAL, tiny_model
from shoal.coordinator.audit import Audit, audit
from shoal.coordinator.journal import JOURNAL
from shoal.errors import RunError

from _common import benchmark, emit

STALENESS = 2
VICTIMS = ("coordinator", "learner", "worker", "all")
WEIGHTS = (3, 3, 3, 1)
PATIENCE_S = 120.0
ORPHAN_S = 15.0
TOLD = re.compile(rb"group (g\d+): \d+ accepted$", re.MULTILINE)


def say(text: str) -> None:
    print(f"resume: {text}", file=sys.stderr, flush=True)


class Subject:
    """The run that is killed, and its processes."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.config = folder / "resume.toml"
        self.path = folder / "runs" / "resume"
        self._log = (folder / "train.log").open("wb")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str | Path) -> None:
        tests = Path(__file__).parents[1] / "tests"
        search = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [*SHOAL, "train", *map(str, arguments), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, "SHOAL_HOME": str(self.home), "PYTHONPATH": search},
            start_new_session=True,
        )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def children(self) -> dict[int, str]:
        """What each child of the coordinator is, by process id: learner or worker."""
        found = {}
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    found[int(pid)] = "learner" if "_learner" in words else "worker"
        return found

    def size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def steps(self) -> int:
        path = self.path / "metrics.jsonl"
        return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0

    def told(self) -> set[str]:
        """Groups that workers were told are accepted."""
        logs = sorted((self.path / "logs").glob("*.log"))
        return {found.decode() for log in logs for found in TOLD.findall(log.read_bytes())}

    def judge(self) -> Audit:
        return audit(self.path, max_staleness=STALENESS, acknowledged=self.told())

    def wait_for(self, condition: Callable[[], bool], what: str) -> float:
        """Seconds until something is so.

        Raises:
            RunError: it is not within two minutes, or the run has ended.
        """
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            if waited > PATIENCE_S or self.process.poll() is not None:
                log = Path(self._log.name).read_text()[-2000:]
                raise RunError(f"The run did not come to {what} in {waited:.0f} s.", f"It said:\n{log}")
            time.sleep(0.02)
        return time.monotonic() - started

    def kill(self, who: str, rng: random.Random) -> bool:
        """Kill one process, or all of them; whether there was one to kill."""
        targets = list(self.children()) if who == "all" else [p for p, what in self.children().items() if what == who]
        if who not in ("all", "coordinator"):
            targets = [rng.choice(targets)] if targets else []
        if who in ("all", "coordinator"):
            targets.insert(0, self.process.pid)
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(targets)

    def orphans(self, children: dict[int, str]) -> int:
        """How many of a killed coordinator's children are left after a while; they are then killed."""
        self.process.wait()
        deadline = time.monotonic() + ORPHAN_S
        while (left := [pid for pid in children if _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            children = self.children()
            self._process.kill()
            self.orphans(children)
        self._log.close()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_config(subject: Subject, model: Path) -> None:
    """The run: quick steps, a checkpoint every third, an environment that takes its time."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny import tiny_config
    from tiny import write_config as write

    tables = tiny_config(
        model,
        subject.path.parent,
        run__name="resume",
        run__steps=1_000_000,
        envs__digit__type="tiny:Slow",
        learner__checkpoint_every=3,
        learner__max_staleness=STALENESS,
        eval__questions=1,
    )
    write(subject.config, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="shoal-resume-"))
    subject = Subject(folder)
    try:
        write_config(subject, tiny_model(folder / "model"))
        rows, leasing, orphans = _torment(subject, options.kills, rng)
        found = subject.judge()
        told = len(subject.told())
    finally:
        subject.close()
    for problem in found.problems:
        say(problem)
    if found.good and not orphans:
        shutil.rmtree(folder)
    else:
        say(f"the run is kept in {folder}")
    counts = {name: value for name, value in asdict(found).items() if name != "problems"}
    headline = {
        "kills": len(rows),
        **counts,
        "acknowledged": told,
        "orphans": orphans,
        "leasing_p50_s": round(statistics.median(leasing), 2),
        "leasing_max_s": round(max(leasing), 2),
    }
    emit(rows, headline)


def _torment(subject: Subject, num_kills: int, rng: random.Random) -> tuple[list[dict[str, Any]], list[float], int]:
    """Kill until it was done often enough; then end the run as Ctrl-C does."""
    rows: list[dict[str, Any]] = []
    leasing: list[float] = []
    orphans = 0
    subject.start(subject.config)
    subject.wait_for(lambda: subject.steps() >= 2, "its second step")
    while len(rows) < num_kills:
        from_step = rng.random() < 0.5
        if from_step:
            done = subject.steps()
            subject.wait_for(lambda done=done: subject.steps() > done, "its next step")  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 3.0 if from_step else 8.0))
        who = rng.choices(VICTIMS, WEIGHTS)[0]
        children = subject.children()
        if not subject.kill(who, rng):
            continue
        rows.append({"who": who, "after_step": from_step, "steps": subject.steps()})
        if who in ("coordinator", "all"):
            orphans += subject.orphans(children)
            found = subject.judge()
            rows[-1]["good"] = found.good
            size = subject.size(JOURNAL)
            subject.start("--resume", subject.path)
            waited = subject.wait_for(lambda size=size: _leases(subject, size), "leasing again")  # type: ignore[misc]
            leasing.append(waited)
            rows[-1]["leasing_s"] = round(waited, 2)
        if len(rows) % 10 == 0:
            say(f"{len(rows)} kills ({dict(Counter(row['who'] for row in rows))}), {subject.steps()} steps")
    done = subject.steps()
    subject.wait_for(lambda: subject.steps() >= done + 5, "five more steps")
    children = subject.children()
    subject.process.terminate()
    orphans += subject.orphans(children)
    return rows, leasing, orphans


def _leases(subject: Subject, size: int) -> bool:
    """Whether a group was handed out since the journal had this size."""
    with (subject.path / JOURNAL).open("rb") as file:
        file.seek(min(size, subject.size(JOURNAL)))
        return b'"start"' in file.read()


if __name__ == "__main__":
    benchmark(main)
