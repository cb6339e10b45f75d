"""A run that trains adapters: they are what is published, and a worker elsewhere acts with them."""

from __future__ import annotations

import pytest
from runs import Runs, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

LORA = {"rank": 2, "alpha": 4.0}


def test_adapters_from_the_learner_to_a_worker_and_the_model_at_the_end(runs: Runs) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from shoal.broadcast.image import read_version
    from shoal.broadcast.store import Store
    from shoal.engine.merging import ALPHA, merged
    from shoal.engine.source import LocalModel
    from shoal.engine.weights import from_views
    from shoal.fabric.identity import Identity

    slow = {"envs__digit__type": "tiny:Slow", "workers__max_sequences": 8}  # it lasts for some heartbeats
    train = runs.train(run__steps=8, workers__count=0, learner__lora=LORA, learner__lr=0.05, **slow)
    until(lambda: (runs.run.path / "ticket.txt").exists(), train)
    worker = runs.shoal("worker", runs.run.ticket, "--name", "elsewhere")
    assert train.wait() == 0, train.said + runs.run.logs()
    assert worker.wait() == 0, worker.said
    run = runs.run
    run.check(steps=8)
    learner = Identity.load_or_create(run.path / "identity" / "learner")
    store = Store(run.path / "snapshots", run=run.path.name, trusted_key=learner.public_key, read_only=True)
    views = read_version(store, "policy", 8)
    assert ALPHA in views and all(name == ALPHA or ".lora_" in name for name in views)
    base = LocalModel("tiny", runs.model)
    state = AutoModelForCausalLM.from_pretrained(run.path / "model").state_dict()
    for name, value in from_views(merged(base, views)).items():
        assert torch.equal(state[name], value), name
    arrived = run.events("snapshot.arrived")
    assert {event["name"] for event in arrived} == {"elsewhere"} and len({e["version"] for e in arrived}) >= 2
    assert all(event["by_source"].keys() == {"learner"} and event["seconds"] > 0 for event in arrived)
