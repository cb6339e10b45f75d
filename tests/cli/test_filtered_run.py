"""A run that leaves groups out: its batches are full of groups that teach, and its sums stay what they are."""

from __future__ import annotations

import pytest
from runs import Runs

from shoal.coordinator.audit import audit

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def test_every_group_of_a_batch_teaches(runs: Runs) -> None:
    changes = {"rollout__dynamic_sampling": True, "rollout__resample_limit": 100.0, "rollout__pass_rate": [0.05, 0.95]}
    train = runs.train(**changes, run__steps=4, eval__before=False, eval__after=False, learner__lr=0.0)
    assert train.wait() == 0, train.said + runs.run.logs()
    runs.run.check(steps=4)
    for episodes in runs.run.episodes().values():
        groups: dict[str, set[float]] = {}
        for episode in episodes:
            groups.setdefault(episode.group, set()).add(episode.reward)
        assert all(len(rewards) > 1 for rewards in groups.values())
    rollouts = runs.run.summary["rollouts"]
    assert 0 < rollouts["filtered_groups"] <= rollouts["swept_groups"]
    found = audit(runs.run.path, max_staleness=2)
    assert found.good and found.swept == rollouts["swept_groups"]
