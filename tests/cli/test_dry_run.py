"""`shoal train --dry-run`: the memory that a run would take, and the refusal of what can't fit."""

from __future__ import annotations

import json

import pytest

from shoal.cli.memory_report import lines_of, memory_of, refuse
from shoal.cli.train import run
from shoal.config import load_config
from shoal.errors import CapacityError


def test_it_tells_the_memory_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run("arithmetic", "--workers.count", "1", dry_run=True, json=True)
    told = json.loads(capsys.readouterr().out)
    memory = told["memory_gib"]
    assert told["config"]["workers"]["count"] == memory["workers"] == 1
    assert memory["needed"]["host"] == pytest.approx(sum(memory["learner"].values()) + sum(memory["worker"].values()))
    assert 3 < memory["needed"]["host"] < 9 and memory["there"]["host"] > 0


def test_it_refuses_what_cannot_fit() -> None:
    found = memory_of(load_config("qwen3_8b", []))
    assert found is not None and any("8191 M parameters" in line for line in lines_of(found))
    where = "gpu" if found["needed"]["gpu"] else "host"
    small = found | {"there": found["there"] | {where: 1.0}}
    with pytest.raises(CapacityError, match="which has 1.0 GiB"):
        refuse(small)
    refuse(found | {"there": {"host": 1000.0, "gpu": 1000.0}})
    assert memory_of(load_config("sokoban", ["--model.name", "no/such-model"])) is None
