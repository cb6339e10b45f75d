"""Checkpoints: resume is exact, damage is found, a killed or starved writer harms nothing."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_cases import random_episodes, tiny_model

from shoal.config.learner import AsyncLearner, Lora
from shoal.errors import StorageError
from shoal.learner.checkpoint import Checkpoint, RandomState, load, load_latest, save
from shoal.learner.trainer import Trainer


def trainer(dtype: torch.dtype = torch.bfloat16, lora: Lora | None = None) -> Trainer:
    torch.manual_seed(1)
    return Trainer(tiny_model(dtype=dtype), AsyncLearner(lr=1e-2, warmup_steps=4, lora=lora))


def small(version: int, fill: float = 1.0) -> Checkpoint:
    weights = {"w": torch.full((64, 64), fill)}
    return Checkpoint(version, weights, {"exp_avg.w": torch.zeros(64, 64)}, extra={"cursor.bin": b"\x00\x01"})


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.3)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype, lora: Lora | None, tmp_path: Path) -> None:
    straight = trainer(dtype, lora)
    for seed in range(3):
        straight.step(random_episodes(seed))
    save(tmp_path, straight.checkpoint({"buffer": b"abc"}))
    expected = [straight.step(random_episodes(seed)) for seed in (3, 4)]

    torch.manual_seed(999)
    resumed = trainer(dtype, lora)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.extra == {"buffer": b"abc"}
    resumed.restore(found)
    assert resumed.version == 3
    for seed, before in zip((3, 4), expected, strict=True):
        metrics = resumed.step(random_episodes(seed))
        assert {**metrics, "train_s": 0} == {**before, "train_s": 0}
    for name, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[name])


def test_random_state_comes_back(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.normal()  # the global generator is what is saved
    save(tmp_path, small(1))
    expected = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal())
    found = load_latest(tmp_path)
    assert found is not None
    found.random.restore()
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal()) == expected


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for version in (1, 2, 3, 10):
        save(tmp_path, small(version, fill=float(version)), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.version == 10
    assert float(found.weights["w"][0, 0]) == 10


def test_a_version_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, small(1, fill=1.0))
    save(tmp_path, small(1, fill=2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert float(load(tmp_path / "step-000001").weights["w"][0, 0]) == 2.0


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "checkpoint.json", "cursor.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, small(1, fill=1.0))
    newest = save(tmp_path, small(2, fill=2.0))
    path = newest / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 0x01
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.warns(UserWarning, match="step-000002"):
        found = load_latest(tmp_path)
    assert found is not None
    assert found.version == 1
    (tmp_path / "step-000001" / "weights.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="is damaged|not what") as record,
        pytest.raises(StorageError, match="no checkpoint"),
    ):
        load_latest(tmp_path)
    assert len(record) == 2


def test_a_checkpoint_of_another_schema_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path, small(1))
    path = directory / "checkpoint.json"
    path.write_bytes(path.read_bytes().replace(b'"schema":1', b'"schema":9'))
    with pytest.raises(StorageError, match="schema 9"):
        load(directory)


def test_a_full_disk_is_a_storage_error_and_harms_nothing(tmp_path: Path) -> None:
    save(tmp_path, small(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(StorageError, match="step-000002") as caught:
            save(tmp_path, small(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "keep_checkpoints" in caught.value.remedy
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load(tmp_path / "step-000001").version == 1


def test_a_checkpoint_larger_than_the_disk_is_refused_before_it_is_written(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 50)
    with pytest.raises(StorageError, match="MiB left"):
        save(tmp_path, Checkpoint(1, {"w": huge}, {}))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, trainer().checkpoint())
    other = Trainer(tiny_model("qwen3", dtype=torch.bfloat16), AsyncLearner())
    with pytest.raises(StorageError, match="another model"):
        other.restore(load(directory))
    with pytest.raises(StorageError, match="optimizer"):
        trainer(torch.float32).restore(load(directory))


WRITER = """
import sys, torch
from pathlib import Path
from shoal.learner.checkpoint import Checkpoint, save
root = Path(sys.argv[1])
version = int(sys.argv[2])
while True:
    version += 1
    weights = {f"w{k}": torch.full((256, 256), float(version)) for k in range(8)}
    save(root, Checkpoint(version, weights, {"o": torch.full((512, 512), float(version))}), keep=2)
    print(version, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = int(writer.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.05))
            writer.kill()
            told = max([told, *(int(line) for line in writer.stdout.read().split("\n") if line.isdigit())])
        found = load_latest(tmp_path)
        assert found is not None
        assert found.version in (told, told + 1)
        assert all((value == found.version).all() for value in [*found.weights.values(), *found.optimizer.values()])
        last = found.version
    save(tmp_path, small(last + 1))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_captured_state_is_plain_data() -> None:
    state = RandomState.capture()
    assert isinstance(state.torch, bytes)
    assert all(isinstance(key, int) for key in state.numpy[0])
