"""A tracker gets what the run's own metrics say, and its absence is noticed before anything starts."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shoal.config import config_from
from shoal.coordinator import tracker
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError
from tiny import tiny_config, tiny_model, write_config

__all__ = ["tiny_model"]

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


def told(run: RunDir) -> None:
    run.metric(kind="step", step=3, reward=0.5)
    run.metric(kind="eval", version=2, strict=0.75)
    run.metric(kind="step", step=4, reward=0.9)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install 'shoal[wandb]'")
def test_wandb_gets_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = RunDir.create(tmp_path / "run")
    with tracker.tracking(config_from(TABLES, ["--output.tracker", "wandb"]), run):
        told(run)
    run.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    kept = file.read_bytes()
    assert b"heldout/strict" in kept and b"0.75" in kept and b"reward" in kept and b"0.9" in kept


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install 'shoal[trackio]'")
def test_trackio_keeps_them_on_this_machine(tmp_path: Path) -> None:
    """In a process of its own: trackio reads its folder's name once."""
    code = (
        "from pathlib import Path; from shoal.config import config_from; from shoal.coordinator import tracker;"
        "from shoal.coordinator.rundir import RunDir; import sys;"
        "run = RunDir.create(Path(sys.argv[1]) / 'run');"
        f"config = config_from({TABLES!r}, ['--output.tracker', 'trackio']);"
        "tracked = tracker.tracking(config, run); tracked.__enter__();"
        "run.metric(kind='step', step=3, reward=0.5); run.metric(kind='eval', version=2, strict=0.75);"
        "tracked.__exit__(None, None, None); run.close()"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "tracked"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "tracked").glob("shoal*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    assert {"reward": 0.5} in rows and {"heldout/strict": 0.75} in rows


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_whole_run_is_tracked(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """From the command line to the tracker's own files: each number of `metrics.jsonl`, under its step."""
    if find_spec(tracker.PACKAGES[name]) is None:
        pytest.skip(f"needs {name}: pip install 'shoal[{name}]'")
    changes = TABLES | {"run__steps": 2, "workers__count": 1, "rollout__groups_per_step": 1, "output__tracker": name}
    config = write_config(tmp_path / "tiny.toml", tiny_config(tiny_model, tmp_path / "runs", **changes))
    environment = os.environ | {
        "SHOAL_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(tmp_path / "tracked"),
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    command = [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line.get("step", line.get("version")) for line in lines) == [0, 1, 2, 2]
    if name == "trackio":
        (file,) = (tmp_path / "tracked").glob("shoal*.db")
        with sqlite3.connect(file) as database:
            rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
        kept = {(step, key) for step, metrics in rows for key in json.loads(metrics)}
        assert kept == {(step, key) for line in lines for step, told in [tracker.numbers_of(line)] for key in told}
        return
    (file,) = tmp_path.glob("runs/tiny/tensorboard/*" if name == "tensorboard" else "wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for line in lines:
        assert all(key.encode() in written for key in tracker.numbers_of(line)[1])
