"""A run whose learner is several processes: it trains, and goes on when any of them is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs import Runs, is_alive, processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

STEPS = 6


def ranks_of(runs: Runs) -> dict[str, int]:
    """The learner's processes that are alive: the agent's and the ranks' ids, by rank."""
    found: dict[str, int] = {}
    for pid in processes_of(runs.path):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"_learner" in command:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((v.removeprefix(b"RANK=").decode() for v in variables if v.startswith(b"RANK=")), "agent")
            found[rank] = pid
    return found


@pytest.mark.parametrize("victim", ["0", "1", "agent"])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(runs: Runs, victim: str) -> None:
    train = runs.train(
        run__steps=STEPS,
        learner__processes=2,
        learner__checkpoint_every=1,
        eval__before=False,
        eval__after=False,
        envs__digit__type="tiny:Slow",
    )
    run = runs.run
    until(lambda: len(run.steps) >= 2, train, run)
    first = ranks_of(runs)
    assert set(first) == {"agent", "0", "1"}
    os.kill(first[victim], signal.SIGKILL)
    until(lambda: not any(map(is_alive, first.values())), train, run)
    assert train.wait() == 0, train.said + run.logs()
    assert [event["node"] for event in run.events("process.died")] == ["learner"]
    run.check(steps=STEPS)
    assert all(line["applied"] in (0.0, 1.0) for line in run.steps)
    assert (run.path / "model" / "model.safetensors").exists()
