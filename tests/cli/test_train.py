"""`shoal train` from start to end, with real processes: what it leaves, what it learns, and what survives kills."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import tomllib
from pathlib import Path

import pytest
from runs import Run, Runs, child, children_of, is_alive, processes_of, until

pytestmark = pytest.mark.timeout(300)
"""Starting a process takes seconds on a busy machine; nothing here is judged by the time it takes."""

SLOW = {"envs__digit__type": "tiny:Slow", "run__steps": 12, "workers__max_sequences": 8}
"""A run that lasts long enough to be disturbed."""

LEARNS = {
    "run__steps": 20,
    "rollout__group_size": 8,
    "rollout__groups_per_step": 4,
    "rollout__max_tokens": 2,
    "eval__max_tokens": 2,
    "learner__lr": 0.03,
    "workers__max_sequences": 32,
}
"""A run that reaches a mean reward of 0.8 and more, from 0.1."""


def mean_reward(run: Run, first: int, last: int) -> float:
    rewards = [line["reward"] for line in run.steps[first:last]]
    return sum(rewards) / len(rewards)


def check_model(run: Run, version: int) -> None:
    """The saved model loads in transformers, and is what was published last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoal.broadcast.image import read_version
    from shoal.broadcast.store import Store
    from shoal.fabric.identity import Identity

    learner = Identity.load_or_create(run.path / "identity" / "learner")
    store = Store(run.path / "snapshots", run=run.path.name, trusted_key=learner.public_key, read_only=True)
    published = store.latest("policy")
    assert published is not None and published.manifest.version == version
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    state = model.state_dict()
    for name, view in read_version(store, "policy", version).items():
        sent = torch.frombuffer(view.data, dtype=torch.float32).reshape(view.shape)
        assert torch.equal(state[name], sent), name
    assert AutoTokenizer.from_pretrained(run.path / "model").chat_template


def test_async_with_two_workers(runs: Runs) -> None:
    """Everything that a run is to leave behind; and the reward rises."""
    train = runs.train(**LEARNS, eval__every=8, output__plots=True)
    assert train.wait() == 0, train.said + runs.run.logs()
    run, result = runs.run, train.result
    run.check(steps=20, groups=4, size=8)
    assert run.summary["max_staleness"] > 0, "asynchronous: something was trained that an older policy had sampled"
    assert any(line.get("staleness/1", 0) + line.get("staleness/2", 0) for line in run.steps)
    assert mean_reward(run, 15, 20) > mean_reward(run, 0, 5) + 0.3, "the reward rises"
    assert sorted(line["version"] for line in run.evals) == [0, 8, 16, 20]
    assert result["accuracy_after"] > result["accuracy_before"] + 0.3
    assert result["heldout_questions"] == 16 and len(result["samples"]) == 3
    assert set(result["worker_rollouts"]) == {"local-0", "local-1"} and result["min_worker_share"] > 0
    rollouts = result["rollouts"]
    assert rollouts["leased"] == sum(rollouts.get(k, 0) for k in ("accepted", "rejected", "void", "expired"))
    check_model(run, 20)

    resolved = tomllib.loads((run.path / "config.toml").read_text())
    assert resolved["run"]["steps"] == 20 and resolved["learner"]["loss"]["type"] == "grpo", "defaults filled in"
    report = (run.path / "report.html").read_text()
    assert str(run.path / "report.html") == result["report"] and "reward" in report
    assert list((run.path / "plots").glob("*.png"))
    joined = run.events("node.joined")
    assert {(e["name"], e["role"]) for e in joined} == {
        ("learner", "learner"),
        ("local-0", "worker"),
        ("local-1", "worker"),
    }
    assert [e["version"] for e in run.events("snapshot.published")] == list(range(21))
    assert {p.name for p in (run.path / "logs").iterdir()} == {"learner.log", "local-0.log", "local-1.log"}
    for name in ("secrets.json", "ticket.txt", "identity/learner/identity.key"):
        assert (run.path / name).stat().st_mode & 0o077 == 0, f"{name} is nobody else's to read"
    assert len(list((run.path / "checkpoints").iterdir())) == 2, "the last two checkpoints are kept"
    assert json.loads((run.path / "evals" / "000020.json").read_text())["answers"][0]["task"]["env"] == "digit"


def test_pull_and_colocated(runs: Runs, tmp_path: Path) -> None:
    """Strictly on-policy, both of them; and the reward rises."""
    changes = {**LEARNS, "eval__before": False, "eval__after": False, "workers__count": 1}
    pull = runs.train(learner__mode="pull", **changes)
    other = Runs(tmp_path / "other", runs.model)
    other.path.mkdir()
    colocated = other.train(learner__mode="colocated", **changes)
    try:
        for train, run, workers in ((pull, runs.run, {"local-0"}), (colocated, other.run, {"learner"})):
            assert train.wait() == 0, train.said + run.logs()
            run.check(steps=20, groups=4, size=8, staleness=0)
            for step, batch in run.episodes().items():
                assert {v for e in batch for t in e.turns for v in t.completion.versions} == {step}
            assert set(run.summary["worker_rollouts"]) == workers
            assert mean_reward(run, 15, 20) > mean_reward(run, 0, 5) + 0.3
            check_model(run, 20)
    finally:
        other.close()


@pytest.mark.slow
def test_a_worker_and_the_learner_killed_on_the_way(runs: Runs) -> None:
    """The worker costs its leases, the learner the steps since its checkpoint, which it repeats with the same data."""
    train = runs.train(**SLOW, learner__checkpoint_every=3)
    run = runs.run
    until(lambda: len(run.steps) >= 2, train, run)
    worker = child(train.pid, "local-0")
    assert worker is not None
    until(lambda: len(run.running()) >= 3, train, run)  # each worker has slots for two
    os.kill(worker, signal.SIGKILL)
    until(lambda: run.events("process.died"), train, run)
    until(lambda: len(run.steps) >= 5, train, run)
    batches = {p.name: p.read_bytes() for p in (run.path / "batches").glob("0*")}
    learner = child(train.pid, "_learner")
    assert learner is not None and batches
    os.kill(learner, signal.SIGKILL)
    until(lambda: len(run.events("process.died")) == 2, train, run)
    kept = {p.name: p.read_bytes() for p in (run.path / "batches").glob("0*")}
    assert train.wait() == 0, train.said + run.logs()
    run.check(steps=12)
    assert batches.items() <= kept.items(), "what the learner will be given again is as it was"
    assert [e["node"] for e in run.events("process.died")] == ["local-0", "learner"]
    lost = run.events("lease.void")
    assert lost and {e["reason"] for e in lost} <= {"died", "restarted"} and len({e["node"] for e in lost}) == 1
    assert "continuing from the checkpoint of version" in run.logs()
    published = [e["version"] for e in run.events("snapshot.published")]
    assert sorted(set(published)) == list(range(13)), "each version is published"
    check_model(run, 12)


@pytest.mark.slow
def test_the_parent_killed_and_the_run_resumed(runs: Runs) -> None:
    train = runs.train(**SLOW, workers__count=1)
    run = runs.run
    until(lambda: len(run.steps) >= 4, train, run)
    children = children_of(train.pid)
    assert len(children) == 2
    train.send(signal.SIGKILL)
    train.wait()
    until(lambda: not any(is_alive(pid) for pid in children))
    assert processes_of(run.path) == [], "no orphan"
    done = len(run.steps)
    ticket = run.ticket
    resumed = runs.shoal("train", "--resume", run.path, "--json")
    assert resumed.wait() == 0, resumed.said + run.logs()
    run.check(steps=12)
    assert done < 12 and run.ticket == ticket, "old tickets stay valid"
    assert resumed.result["steps"] == 12 and "accuracy_before" in resumed.result
    assert set(run.summary["worker_rollouts"]) == {"local-0"}, "names outlive the kill"
    check_model(run, 12)


@pytest.mark.slow
def test_a_finished_run_resumed_is_finished(runs: Runs) -> None:
    train = runs.train()
    assert train.wait() == 0, train.said
    runs.run.check(steps=4)
    again = runs.shoal("train", "--resume", runs.run.path, "--json")
    assert again.wait() == 0, again.said
    assert again.result["accuracy_after"] == train.result["accuracy_after"]
    runs.run.check(steps=4)
    check_model(runs.run, 4)


def test_ctrl_c(runs: Runs) -> None:
    """The terminal's signal reaches the parent alone; it ends the others in order."""
    train = runs.train(**SLOW, workers__count=1)
    run = runs.run
    until(lambda: len(run.steps) >= 1, train, run)
    children = children_of(train.pid)
    second = runs.shoal("train", "--resume", run.path)
    assert second.wait() == 2 and "going on in another process" in second.said
    train.send(signal.SIGINT)
    assert train.wait() == 130
    assert f"Continue with: shoal train --resume {run.path}" in train.said and "Traceback" not in train.said
    assert not any(is_alive(pid) for pid in children) and processes_of(run.path) == []
    assert len(run.events("run.ended")) == 1
    assert "Traceback" not in run.logs(), run.logs()


@pytest.mark.slow
def test_the_learner_killed_during_the_last_evaluation(runs: Runs) -> None:
    train = runs.train(envs__digit__type="tiny:Slow", run__steps=2, eval__questions=60, workers__count=1)
    run = runs.run
    until(lambda: len(run.steps) == 2 and (run.path / "model" / "config.json").exists(), train, run)
    learner = child(train.pid, "_learner")
    assert learner is not None and [line["version"] for line in run.evals] == [0]
    os.kill(learner, signal.SIGKILL)
    assert train.wait() == 0, train.said + run.logs()
    run.check(steps=2)
    assert [line["version"] for line in run.evals] == [0, 2]
    check_model(run, 2)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.0, 2.0, 4.0, 7.0, 11.0])
def test_ctrl_c_at_any_time(runs: Runs, after_s: float) -> None:
    train = runs.train(**SLOW, run__name="tiny")
    time.sleep(after_s)
    train.send(signal.SIGINT)
    assert train.wait() == 130, train.said
    assert "Traceback" not in train.said and processes_of(runs.path) == []
    assert runs.run.path.exists() == ("--resume" in train.said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 8])
def test_kills_at_random_moments(runs: Runs, seed: int) -> None:
    """Parent, learner and workers killed again and again; the run ends as if nothing had been."""
    rng = random.Random(seed)
    train = runs.train(**{**SLOW, "run__steps": 40})
    run = runs.run
    for _ in range(5):
        parent = train.pid
        until(lambda parent=parent: len(children_of(parent)) == 3, train, run)
        time.sleep(rng.uniform(0.0, 14.0))
        if train.process.poll() is not None:
            break
        who = rng.choice(["parent", "parent", "_learner", "local-0", "local-1"])
        pid = train.pid if who == "parent" else child(train.pid, who)
        if pid is None:
            continue
        os.kill(pid, signal.SIGKILL)
        if who == "parent":
            train.wait()
            until(lambda: processes_of(run.path) == [])
            train = runs.shoal("train", "--resume", run.path, "--json")
    assert train.wait() == 0, train.said + run.logs()
    run.check(steps=40)
    check_model(run, 40)
