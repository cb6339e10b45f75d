"""A tracker gets what the run's own metrics say, and its absence is noticed before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import config_from
from shoal.coordinator import tracker
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError

TABLES = {"envs": {"arithmetic": {"type": "arithmetic"}}}


def test_tensorboard_gets_the_numbers_of_steps_and_evaluations(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    config = config_from(TABLES, ["--output.tracker", "tensorboard"])
    run = RunDir.create(tmp_path / "run")
    with tracker.tracking(config, run):
        run.metric(kind="step", step=3, reward=0.5, loss=-0.25)
        run.metric(kind="eval", version=3, questions=200, strict=0.75)
    run.metric(kind="step", step=4, reward=0.9)  # nobody listens any more
    run.close()
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    data, seen = file.read_bytes(), {}
    while data:  # TFRecord: length (8), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert seen == {
        ("reward", 3): 0.5,
        ("loss", 3): -0.25,
        ("heldout/questions", 3): 200.0,
        ("heldout/strict", 3): 0.75,
    }
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracker.PACKAGES, "wandb", "no_such_package_here")
    tracker.check_tracker(config_from(TABLES))
    with pytest.raises(ConfigError, match=r"no_such_package_here.*shoal\[wandb\]"):
        tracker.check_tracker(config_from(TABLES, ["--output.tracker", "wandb"]))
