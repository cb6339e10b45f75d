"""A run whose rollouts vLLM draws: it trains, its worker ends in order, and leaves no process, however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs import Process, Runs, is_alive, processes_of, until

from tiny import make_wide_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("SHOAL_VLLM_PYTHON"), reason="SHOAL_VLLM_PYTHON names no Python that has vLLM"
    ),
]

STEPS = 4
BEGIN_S = 400.0


def below(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *below(child)]
    return found


def started(runs: Runs, **changes: object) -> tuple[Process, Process]:
    """A run without workers of its own, and a worker by vLLM."""
    model = make_wide_model(runs.path / "wide")
    given = {"run__steps": STEPS, "workers__count": 0, "trust__seeds": False, "model__name": str(model)}
    train = runs.train(**given, eval__before=False, eval__after=False, **changes)
    until((runs.run.path / "ticket.txt").exists, train, runs.run)
    ticket = str(runs.run.path / "ticket.txt")
    worker = runs.shoal("worker", ticket, "--engine", "vllm", "--grace", "20", "--json", "--device", "cpu")
    return train, worker


def test_a_run_that_vllm_samples_for(runs: Runs) -> None:
    train, worker = started(runs, trust__probation=4, learner__mode="pull")
    assert train.process.wait(BEGIN_S) == 0, train.said + worker.said + runs.run.logs()
    assert worker.wait() == 0, worker.said
    assert worker.result["rollouts"] >= STEPS * 12
    run = runs.run
    run.check(steps=STEPS)
    for line in run.steps:
        assert line["mismatch_kl"] < 1e-4, "what vLLM says it drew with is what the learner computes"
    assert not run.events("worker.excluded")
    assert processes_of(runs.home) == []


def test_a_worker_that_is_killed_takes_vllm_with_it(runs: Runs) -> None:
    train, worker = started(runs)
    until(lambda: len(below(worker.pid)) >= 3, worker)
    found = below(worker.pid)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not any(map(is_alive, found)))
    train.send(signal.SIGTERM)
    train.wait()


def test_a_run_that_checks_seeds_refuses_it(runs: Runs) -> None:
    train = runs.train(run__steps=STEPS, workers__count=0)
    until((runs.run.path / "ticket.txt").exists, train, runs.run)
    worker = runs.shoal("worker", str(runs.run.path / "ticket.txt"), "--engine", "vllm", "--device", "cpu")
    assert worker.wait() != 0
    assert "trust.seeds = false" in worker.said
    train.send(signal.SIGTERM)
    train.wait()
