"""Whole runs with everybody behind a NAT and routers in public: `benchmarks/join.py` in its smallest size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.lab import namespaces

JOIN = Path(__file__).parents[2] / "benchmarks" / "join.py"
SMALL = ("--workers", "2", "--steps", "8")

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]


def join(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Headline and rows."""
    command = [sys.executable, str(JOIN), *arguments, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["headline"]["finished"], (done.stderr, result["rows"])
    return result["headline"], result["rows"]


def test_a_run_behind_nats_finishes_and_its_router_reads_nothing() -> None:
    headline, rows = join("--only", "nat")
    assert headline["inbound_connections"] == 0
    assert headline["router_bytes"] > 1_000_000
    kinds = {row["kind"]: row for row in rows if row["part"] == "plaintext"}
    assert set(kinds) >= {"prompts", "answers", "replies", "token_ids", "log_probabilities", "weights", "work_spec"}
    assert all(row["planted"] > 0 and row["bytes_found"] == 0 for row in kinds.values()), kinds
    # The same tap, the same search, the same patterns, not sealed: each is found.
    assert all(row["control_found"] == row["control_said"] > 0 for row in kinds.values()), kinds


def test_a_router_that_comes_back_is_found_again() -> None:
    headline, _ = join("--only", "restart")
    assert headline["restart_pause_s"] > 0


def test_ctrl_c_takes_everything_down() -> None:
    with subprocess.Popen([sys.executable, str(JOIN), "--only", "restart", *SMALL], stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 300
            while len(mine := namespaces_of(process.pid)) < 5 and time.monotonic() < deadline:
                time.sleep(0.05)
            while len(inside := namespaces.processes_in(mine)) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)  # the router, the run, its learner, a worker
            assert len(mine) == 5 and len(inside) >= 4
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert namespaces_of(process.pid) == []
    assert not any(namespaces.start_ticks(pid) for pid in inside)


def namespaces_of(pid: int) -> list[str]:
    return [name for name, (owner, _) in namespaces.existing().items() if owner.pid == pid]
