"""Several ranks: what each computes counts once, their gradients are one process's, and their checkpoints anybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_cases import random_episodes
from rank_cases import CASES, episodes_of, make
from safetensors.torch import load_file
from torch import Tensor

from shoal.config.learner import AsyncLearner, ColocatedLearner
from shoal.learner import checkpoint
from shoal.learner.batch import assemble
from shoal.learner.packing import MicroBatch, pack
from shoal.learner.sharding import deal, row_tokens
from shoal.learner.trainer import Trainer

HERE = Path(__file__).parent

LAUNCH_S = 300


def rows_of(seed: int, groups: int, limit: int) -> list[MicroBatch]:
    kept, _ = assemble(random_episodes(seed, groups=groups), AsyncLearner().advantage, skip=False)
    return pack(kept, limit)


@given(seed=st.integers(0, 50), groups=st.integers(1, 6), limit=st.integers(16, 200), ranks=st.integers(1, 5))
def test_every_row_counts_on_one_rank_and_all_compute_equally_many(
    seed: int, groups: int, limit: int, ranks: int
) -> None:
    rows = rows_of(seed, groups, limit)
    dealt = [deal(rows, rank, ranks) for rank in range(ranks)]
    assert len({len(own) for own in dealt}) == 1
    counted = sorted(id(row) for own in dealt for row, counts in own if counts)
    assert counted == sorted(map(id, rows))
    for turn in zip(*dealt, strict=True):
        sizes = [len(row.input_ids) for row, counts in turn if counts]
        assert sizes == sorted(sizes, reverse=True)


def test_a_short_step_is_cut_so_that_every_rank_has_some() -> None:
    assert row_tokens(100, 4, 1024) == 25 and row_tokens(10_000, 4, 1024) == 1024 and row_tokens(0, 4, 1024) == 1
    assert deal([], 0, 2) == []


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "rank_cases.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=LAUNCH_S,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def gradients(saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """Of the first step: Adam's first moment is then the gradient times 1 − β1, for nothing is clipped."""
    prefix = "exp_avg."
    return {k.removeprefix(prefix): v / 0.1 for k, v in saved.optimizer.items() if k.startswith(prefix)}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The difference of two sets of tensors, relative to the first's norm."""
    assert one.keys() == other.keys()
    norm = float(sum(t.double().square().sum() for t in one.values())) ** 0.5
    return float(sum((t.double() - other[k].double()).square().sum() for k, t in one.items())) ** 0.5 / norm


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_do_what_one_process_does(together: Path, name: str) -> None:
    exact = CASES[name][1] == torch.float32
    alone = make(Trainer, name)
    metrics = alone.step(episodes_of(0))
    first = alone.checkpoint()
    theirs = checkpoint.load(checkpoint.path_of(together / name, 1))
    assert apart(gradients(first), gradients(theirs)) <= (1e-4 if exact else 2e-2)
    for key, own in gradients(first).items():
        if exact and float(own.norm()) > 1e-6:
            assert apart({key: own}, {key: gradients(theirs)[key]}) <= 1e-4, key
    told = json.loads((together / name / "metrics.json").read_text())
    for key in ("reward", "tokens", "trained_tokens", "ratio_max", "ratio_min", "loss", "grad_norm", "mismatch_kl"):
        assert told[0][key] == pytest.approx(metrics[key], rel=1e-3 if exact else 0.1, abs=1e-5 if exact else 0.1), key

    alone.step(episodes_of(1))
    again = checkpoint.load(checkpoint.path_of(together / name / "again", 2))
    second = checkpoint.load(checkpoint.path_of(together / name, 2))
    assert apart(dict(second.weights), dict(again.weights)) == 0, "ranks go on from their own checkpoint bit for bit"
    if exact:
        # Adam divides by what may be nearly nothing, so weights agree less exactly than gradients.
        assert apart(dict(alone.checkpoint().weights), dict(second.weights)) <= 1e-3
        assert apart(alone.tensors(), load_file(together / name / "tensors")) <= 1e-3


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["full", "lora", "bf16", "lora_bf16"])
def test_one_process_goes_on_from_what_ranks_saved(together: Path, name: str) -> None:
    saved = checkpoint.load(checkpoint.path_of(together / name, 1))
    alone = make(Trainer, name)
    alone.restore(saved)
    assert alone.version == 1
    for key, weight in saved.weights.items():
        assert torch.equal(alone.trainable()[key].detach(), weight), "what was saved is what the ranks computed with"
    own = alone.checkpoint()
    assert own.optimizer.keys() == saved.optimizer.keys()
    assert all(torch.equal(own.optimizer[key], saved.optimizer[key]) for key in saved.optimizer)
    alone.step(episodes_of(1))
    theirs = checkpoint.load(checkpoint.path_of(together / name, 2))
    limit = 1e-3 if CASES[name][1] == torch.float32 else 2e-2
    assert apart(dict(alone.checkpoint().weights), dict(theirs.weights)) <= limit


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        AsyncLearner(processes=2, optimizer="adamw8bit")
    with pytest.raises(ValueError, match="is one GPU"):
        AsyncLearner(processes=2, device="cuda:1")
    with pytest.raises(ValueError, match="is one process"):
        ColocatedLearner(processes=2)
