"""Instances: inside their intervals, and the same everywhere."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.evm.definition import (
    COMPOSITE_GROUPS,
    GROUPS,
    AmountParameter,
    NumberParameter,
    read_tasks,
    shipped_tasks,
)
from shoal.envs.evm.language import ETHER
from shoal.envs.evm.sampling import sample
from shoal.errors import TaskError

TASKS = list(shipped_tasks().values())
COUNTS = {
    "native": 7,
    "erc20": 12,
    "nft": 6,
    "contract": 3,
    "swap": 5,
    "liquidity": 4,
    "staking": 5,
    "defi_query": 3,
    "query": 14,
    "advanced": 3,
    "approve": 8,
    "batch": 6,
    "verify": 10,
    "defi": 12,
    "stake": 6,
    "nft_bundle": 2,
    "optimised": 1,
}


def test_there_are_62_atomic_and_45_composite_tasks() -> None:
    assert {group: sum(t.group == group for t in TASKS) for group in GROUPS + COMPOSITE_GROUPS} == COUNTS
    assert sum(not t.composite for t in TASKS) == 62
    assert sum(t.composite for t in TASKS) == 45


def test_a_task_is_at_most_forty_lines() -> None:
    for entry in resources.files("shoal.envs.evm.tasks").iterdir():
        if entry.name.endswith(".toml"):
            for part in entry.read_text(encoding="utf-8").split("[[task]]")[1:]:
                assert part.strip().count("\n") < 40, part[:80]
                assert tomllib.loads("[[task]]" + part)


@given(st.sampled_from(TASKS), st.integers(0, 2**62))
def test_parameters_stay_in_their_intervals(task: object, seed: int) -> None:
    definition = next(t for t in TASKS if t is task)
    instance = sample(definition, seed)
    assert instance == sample(definition, seed)
    assert "{" not in instance.instruction
    for name, parameter in definition.parameters.items():
        value = instance.values[name]
        if isinstance(parameter, AmountParameter):
            assert Decimal(parameter.low) * ETHER <= value <= Decimal(parameter.high) * ETHER
            assert value % 10 ** (18 - parameter.decimals) == 0
        elif isinstance(parameter, NumberParameter):
            assert parameter.low <= value <= parameter.high and (value - parameter.low) % parameter.step == 0


def test_the_whole_interval_and_every_template_are_drawn() -> None:
    task = shipped_tasks()["bnb_transfer_basic"]
    instances = [sample(task, seed) for seed in range(500)]
    amounts = {i.values["amount"] for i in instances}
    assert min(amounts) <= 3 * ETHER // 1000 and max(amounts) >= 98 * ETHER // 1000
    assert len({i.instruction.split()[0] for i in instances}) == len(task.templates)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("points", "30", "31"), "sum to 100"),
        (("group", '"native"', '"nonsense"'), "no group"),
        (("template", "{to}.", "{nobody}."), "nobody"),
        (("expression", '"ok()"', '"ok("'), "no expression"),
        (("atomic", '["pay(to, amount)"]', '["pay(to, amount)", "pay(to, amount)"]'), "one act"),
        (("unknown key", "solution =", "sollution ="), "sollution"),
    ],
)
def test_a_wrong_task_is_refused_with_its_name(change: tuple[str, str, str], word: str) -> None:
    text = resources.files("shoal.envs.evm.tasks").joinpath("native.toml").read_text(encoding="utf-8")
    first = "[[task]]" + text.split("[[task]]")[1]
    assert len(read_tasks(first, "here")) == 1
    with pytest.raises(TaskError, match=word):
        read_tasks(first.replace(change[1], change[2], 1), "here")
