"""Whole runs under faults: `benchmarks/chaos.py` for single seeds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from _chaos_script import draw
from shoal.lab import namespaces

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"

PATIENCE_S = 560.0

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]


def chaos(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Headline and rows."""
    command = [sys.executable, str(CHAOS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["headline"], result["rows"]


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_run_under_faults_keeps_every_promise(seed: int, tmp_path: Path) -> None:
    headline, (row,) = chaos("--runs", "1", "--seed", str(seed), "--folder", str(tmp_path / "results"))
    assert row["violations"] == [] and headline["violations"] == 0
    assert row["struck"] == sorted({fault.kind for fault in draw(seed).faults})
    assert row["acknowledged"] > 0 and row["requests"]["answered"] > 0 and row["steps"] > 2
    # What is there is not run again.
    began_s = time.monotonic()
    again, _ = chaos("--runs", "1", "--seed", str(seed), "--folder", str(tmp_path / "results"))
    assert again["runs"] == 1 and time.monotonic() - began_s < row["seconds"]


def test_ctrl_c_leaves_no_process_no_namespace_and_no_mount(tmp_path: Path) -> None:
    command = [sys.executable, str(CHAOS), "--runs", "1", "--folder", str(tmp_path / "results")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        try:
            deadline = time.monotonic() + PATIENCE_S / 2
            while len(mine := namespaces_of(process.pid)) < 6 and time.monotonic() < deadline:
                time.sleep(0.05)
            while len(inside := processes_in(process.pid, mine)) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)  # two routers, the run, its learner
            assert len(mine) == 6 and len(inside) >= 4
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(90) == 130
        finally:
            process.kill()
    assert namespaces_of(process.pid) == []
    assert not any(namespaces.start_ticks(pid) for pid in inside)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.glob("shoal-chaos-*")) == []


def namespaces_of(pid: int) -> list[str]:
    return [name for name, (owner, _) in namespaces.existing().items() if owner.pid == pid]


def processes_in(pid: int, names: list[str]) -> list[int]:
    """Processes in namespaces that only the benchmark's own mounts show."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            inodes = {os.stat(f"/proc/{pid}/root{namespaces.FOLDER}/{name}").st_ino for name in names}
            if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino in inodes:
                found.append(int(entry))
    return found
