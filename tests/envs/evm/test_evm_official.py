"""The benchmark's own definitions load: wording and intervals theirs, checks ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.official import load_official
from shoal.envs.evm.selftest import selftest
from shoal.envs.registry import make
from shoal.errors import TaskError

FOLDER = Path(os.environ.get("SHOAL_DATA", "")) / "evm_questbench"
needs_data = pytest.mark.skipif(
    "SHOAL_DATA" not in os.environ or not FOLDER.is_dir(), reason="needs the data set evm_questbench in SHOAL_DATA"
)


@needs_data
def test_all_107_load_with_our_intervals(pyrevm: ChainBackend) -> None:
    found = load_official(FOLDER)
    assert found.keys() == shipped_tasks().keys()
    ours = [name for name, o in found.items() if any("wording" in change for change in o.changes)]
    assert len(ours) <= 2
    assert all("drawn" not in change for o in found.values() for change in o.changes)
    tested = selftest([o.definition for o in found.values()], [pyrevm], seeds=1, mutant_seeds=0)
    assert (tested.tasks, tested.reference_min) == (107, 100.0)


@needs_data
async def test_the_environment_asks_in_the_benchmark_s_words() -> None:
    env = make("evm", {"official": str(FOLDER), "tasks": ["query_gas_price"]})
    opening = await env.reset(env.task("heldout", 0, 0))
    await env.close()
    own = make("evm", {"tasks": ["query_gas_price"]})
    assert opening.messages[-1].content != (await own.reset(own.task("heldout", 0, 0))).messages[-1].content
    await own.close()


def test_a_changed_interval_is_taken_over_and_said(tmp_path: Path) -> None:
    file = tmp_path / "bnb_transfer_basic.json"
    file.write_text(
        '{"natural_language_templates": ["Give {to_address} {amount} BNB"], "parameters": {'
        '"to_address": {"generation": {"method": "random"}},'
        '"amount": {"generation": {"method": "random", "min": 2, "max": 3, "decimals": 1}}}}',
        encoding="utf-8",
    )
    official = load_official(tmp_path)["bnb_transfer_basic"]
    assert official.definition.templates == ("Give {to_address} {amount} BNB",)
    assert official.changes == ("amount is drawn from 2 to 3",)


@pytest.mark.parametrize("content", ["[]", "{", '{"parameters": []}', "\x00"])
def test_what_is_no_definition_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bnb_transfer_basic.json").write_text(content, encoding="utf-8")
    with pytest.raises(TaskError):
        load_official(tmp_path)
