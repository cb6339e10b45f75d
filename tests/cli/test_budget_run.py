"""A whole run that reaches its budget stops in order, and goes on when it may cost more."""

from __future__ import annotations

import json

import pytest
from runs import Runs, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 12
DOLLARS_A_SECOND = 3600.0


def test_a_run_drains_at_its_budget_and_goes_on_with_a_larger_one(runs: Runs) -> None:
    """Killed after some steps, then resumed with two dollars left, at a dollar a second, and a minute for the drain."""
    changes = {
        "run__steps": STEPS,
        "envs__digit__type": "tiny:Slow",
        "learner__checkpoint_every": 0,
        "budget__learner_usd_per_hour": DOLLARS_A_SECOND,
        "budget__max_usd": 10_000.0,
        "eval__before": False,
        "eval__after": False,
    }
    train = runs.train(**changes)
    run = runs.run
    until(lambda: len(run.steps) >= 3, train, run)
    train.process.kill()
    train.process.wait()
    spent = json.loads((run.path / "costs.json").read_text())["usd"]
    assert spent > 0, "what was spent outlives a kill"

    config = run.path / "config.toml"
    text = config.read_text()
    assert "max_usd = 10000.0" in text
    config.write_text(text.replace("max_usd = 10000.0", f"max_usd = {spent + 62.0}"))
    again = runs.shoal("train", "--resume", run.path, "--json")
    until(lambda: run.events("budget.drain"), again, run)
    until(lambda: any(e["name"] == "learner" for e in run.events("node.joined")[3:]), again, run)
    assert again.wait() != 0
    assert "is used up" in again.said and "its state is saved" in again.said, again.said
    assert len(list((run.path / "checkpoints").iterdir())) == 1, "saved, although no checkpoint was due"

    config.write_text(text)
    last = runs.shoal("train", "--resume", run.path, "--json")
    assert last.wait() == 0, last.said + run.logs()
    run.check(steps=STEPS)
    assert last.result["usd"] > spent
    assert {"usd_idle", "usd_lost_void", "usd_lost_stale"} <= last.result.keys()
    assert "capacity/rate" in run.steps[-1] and "usd" in run.steps[-1]
