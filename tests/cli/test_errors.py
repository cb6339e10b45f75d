"""What a user can get wrong, each answered by one paragraph, exit code 2, no traceback, and nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Process, Runs, processes_of, until

pytestmark = pytest.mark.timeout(300)


def error_of(process: Process, runs: Runs) -> str:
    """The paragraph that the command ended with."""
    code = process.wait()
    said = process.said
    assert code == 2, said
    assert "Traceback" not in said
    error = said[said.index("Error: ") :].strip()
    assert "\n\n" not in error and error.endswith((".", "json", "resume"))
    assert processes_of(runs.path / "runs") == []
    return " ".join(error.split())


@pytest.mark.parametrize("name", ["/no/such/model", "nonsense"])
def test_a_missing_model(runs: Runs, name: str) -> None:
    train = runs.shoal("train", runs.config(model__name=name))
    assert f"there is no model '{name}'" in error_of(train, runs)
    assert not runs.run.path.exists(), "a run that never began leaves no folder, so its name is free"


def test_a_directory_that_is_no_model(runs: Runs) -> None:
    (runs.path / "empty").mkdir()
    train = runs.shoal("train", runs.config(model__name=str(runs.path / "empty")), "--json")
    assert "has no config.json" in error_of(train, runs)
    assert train.result["error"]["kind"] == "ModelError", "machines are told as well"


def test_a_context_beyond_the_models(runs: Runs) -> None:
    error = error_of(runs.shoal("train", runs.config(model__context_tokens=1024)), runs)
    assert "context_tokens = 1024 is more than the 256 tokens" in error and "Set it to 256" in error
    assert not runs.run.path.exists()


def test_a_damaged_model_is_told_by_the_process_that_found_it(runs: Runs) -> None:
    broken = shutil.copytree(runs.model, runs.path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a tensor in sight")
    error = error_of(runs.shoal("train", runs.config(model__name=str(broken))), runs)
    assert "stopped: " in error and "model" in error and str(broken) in error and "Its log is" in error, error


def test_a_bad_key_and_a_bad_value(runs: Runs) -> None:
    config = runs.config()
    config.write_text(config.read_text().replace("[learner]", "[learner]\nlearning_rate = 1.0"))
    assert "learning_rate" in error_of(runs.shoal("train", config), runs)
    assert "steps" in error_of(runs.shoal("train", runs.config(), "--run.steps", "many"), runs)
    assert "no environment 'juggling'" in error_of(
        runs.shoal("train", runs.config(envs={"x": {"type": "juggling"}})), runs
    )


def test_a_port_that_is_taken(runs: Runs) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = error_of(runs.shoal("train", runs.config(network__port=port)), runs)
    assert f"port {port} on 127.0.0.1 is taken" in error
    assert not runs.run.path.exists()


def test_an_address_that_is_not_this_machines(runs: Runs) -> None:
    error = error_of(runs.shoal("train", runs.config(network__host="203.0.113.7")), runs)
    assert "cannot listen on port" in error


def test_the_name_of_a_run_that_exists(runs: Runs) -> None:
    runs.run.path.mkdir(parents=True)
    (runs.run.path / "config.toml").write_text("# somebody's run\n")
    error = error_of(runs.shoal("train", runs.config()), runs)
    assert "there is a run in" in error and "--resume" in error
    assert (runs.run.path / "config.toml").read_text() == "# somebody's run\n"


def test_resuming_what_is_no_run(runs: Runs) -> None:
    (runs.path / "holiday").mkdir()
    for where in ("holiday", "nowhere", str(runs.path / "holiday")):
        assert "there is no run in" in error_of(runs.shoal("train", "--resume", where), runs)
    assert list((runs.path / "holiday").iterdir()) == []
    both = runs.shoal("train", runs.config(), "--resume", "holiday")
    assert "either a configuration or --resume" in error_of(both, runs)


def test_a_damaged_journal(runs: Runs) -> None:
    config = runs.config()
    runs.run.path.mkdir(parents=True)
    shutil.copy(config, runs.run.path / "config.toml")
    (runs.run.path / "journal.jsonl").write_text('{"what":"accept","numbers":[3],"version":0}\n')
    assert "journal is damaged" in error_of(runs.shoal("train", "--resume", runs.run.path), runs)


def test_no_workers(runs: Runs) -> None:
    """The run waits, and says how to add one; that is no error."""
    train = runs.train("--workers", "0", eval__before=False)
    until(lambda: runs.run.events("snapshot.published"), train, runs.run)
    assert "it waits until one joins" in train.said and f"shoal worker {runs.run.ticket}" in train.said
    assert runs.run.steps == []
    train.send(signal.SIGINT)
    assert train.wait() == 130
    assert "Continue with: shoal train --resume" in train.said


@pytest.mark.slow
def test_an_environment_that_always_fails(runs: Runs) -> None:
    train = runs.train(envs__digit__type="tiny:Broken", eval__before=False, workers__count=1)
    error = error_of(train, runs)
    assert "failed 8 times, last because ValueError in environment 'digit': the author divided by a banana" in error
    assert "Continue with: shoal train --resume" in train.said
    assert json.loads(train.out.read_text())["error"]["kind"] == "RunError"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that fills up after a few snapshots."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=False)


def test_a_disk_that_is_full(runs: Runs, small_disk: Path) -> None:
    train = runs.train(run__dir=str(small_disk), run__steps=50, eval__before=False, workers__count=1)
    code = train.wait()
    said = train.said
    assert code == 2 and "Traceback" not in said, said
    error = " ".join(said[said.index("Error: ") :].split())
    assert "space" in error.lower() and str(small_disk) in error, error
    assert processes_of(small_disk) == []


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit, to limit the size of files")
def test_a_disk_on_which_a_run_cannot_even_begin(runs: Runs) -> None:
    train = runs.shoal("train", runs.config(), prefix=("prlimit", "--fsize=64:64"), PYTHONDONTWRITEBYTECODE="1")
    assert train.wait() == 2, train.said
    assert not (runs.run.path / "events.jsonl").exists()
