"""A coordinator that comes back: it leads its workers before its learner can, or says in a sentence why it cannot."""

from __future__ import annotations

import os
import signal

import pytest
from runs import Runs, child, processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_work_is_handed_out_while_the_learner_is_still_starting(runs: Runs) -> None:
    """The learner is stopped as soon as it begins, so whatever is handed out was handed out without it."""
    train = runs.train("--workers", "0", envs__digit__type="tiny:Slow", run__steps=14)
    run = runs.run
    until(lambda: (run.path / "ticket.txt").exists(), train)
    worker = runs.shoal("worker", run.ticket, "--name", "far", "--device", "cpu", "--json")
    until(lambda: len(run.steps) >= 4, train, run)
    train.send(signal.SIGKILL)
    train.wait()
    until(lambda: len(processes_of(run.path)) == 0)
    done = len(run.journal())
    published = len(run.events("snapshot.published"))
    resumed = runs.shoal("train", "--resume", run.path, "--json")
    learner = until(lambda: child(resumed.pid, "_learner"), resumed, run)
    os.kill(learner, signal.SIGSTOP)
    try:
        until(lambda: any(entry.what == "start" for entry in run.journal()[done:]), resumed, run)
        assert len(run.events("snapshot.published")) == published, "the learner had come before it was stopped"
    finally:
        os.kill(learner, signal.SIGCONT)
    assert resumed.wait() == 0, resumed.said + run.logs()
    assert worker.wait() == 0, worker.said
    run.check(steps=14)


def test_tickets_that_cannot_be_written_are_one_sentence(runs: Runs) -> None:
    """A full disk met a coordinator in the moment between its first answer and its tickets, and what was already at
    work ended in tracebacks. Here something else has the ticket's name."""
    train = runs.train("--workers", "0", eval__before=False)
    run = runs.run
    until(lambda: (run.path / "ticket.txt").exists(), train)
    train.send(signal.SIGINT)
    assert train.wait() == 130
    (run.path / "own-ticket.txt").unlink()
    (run.path / "own-ticket.txt").mkdir()
    resumed = runs.shoal("train", "--resume", run.path, "--json")
    assert resumed.wait() == 2
    assert "cannot be written" in resumed.said and "Traceback" not in resumed.said, resumed.said
