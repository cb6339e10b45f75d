"""Notes are part of the task: within a budget, marked, the same for whoever plays it; a share of tasks goes without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_makers import make_entry, noisy_trials

from shoal.config import Config
from shoal.coordinator.tasks import TaskSource, make_environments
from shoal.envs.registry import make
from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.recalling import asked_in, entries_of, keeper_of, noted, shown_with, without_notes
from shoal.memory.screening import RECALLED_CLOSE, RECALLED_OPEN
from tiny import FirstDigit

TEXT = "Write the carry of a sum above the next column."


@pytest.fixture
def memories(tmp_path: Path, shoal_home: Path) -> Iterator[Path]:
    folder = tmp_path / "memories"
    with Keeper(folder, "n") as keeper:
        entry = keeper.add(make_entry(TEXT))
        assert keeper.report(entry.id, noisy_trials(0.5, 200, 1)).verdict == "accept"
    keeper_of.cache_clear()
    yield folder
    keeper_of(str(folder)).close()
    keeper_of.cache_clear()


async def test_a_runs_tasks_carry_notes_that_its_workers_show(memories: Path) -> None:
    config = Config.model_validate(
        {
            "envs": {"sums": {"type": "arithmetic"}},
            "memory": {"recall": True, "folder": str(memories), "share": 0.5, "max_tokens": 400},
        }
    )
    kind, settings = config.worlds["sums"]
    settings = {**settings, "model": ""}
    env = make(kind, settings, name="sums")
    tasks = [env.task("train", n, 0) for n in range(60)]
    with_notes = [task for task in tasks if entries_of(task)]
    assert 15 < len(with_notes) < 45
    # A worker has no memories of its own: what it shows stands in the task.
    worker = make(kind, {**settings, "folder": str(memories / "nowhere")}, name="sums")
    plain = make("arithmetic", {}, name="sums")
    for task in tasks:
        inner, notes = without_notes(task)
        shown = (await worker.reset(task)).messages
        bare = (await plain.reset(inner)).messages
        assert bool(notes) == bool(entries_of(task))
        if notes:
            assert notes.startswith(RECALLED_OPEN) and notes.endswith(RECALLED_CLOSE) and TEXT in notes
            assert len(notes.encode()) <= 400
            assert shown[-1].content == f"{notes}\n\n{bare[-1].content}" and shown[:-1] == bare[:-1]
        else:
            assert shown == bare
        right = plain.answers(inner)[0]
        assert worker.answers(task) == (right,)
        # The reward is recomputed from the task that carries the notes.
        assert (await worker.score(task, [right])).reward == 1.0
        await worker.close()
    assert asked_in(plain, inner) == bare[-1].content
    assert env.heldout(5)[0].id == plain.heldout(5)[0].id
    assert not (memories / "nowhere").exists()


def test_programs_and_runs_without_recall_are_left_as_they_are() -> None:
    envs = {"sums": {"type": "arithmetic"}, "own": {"type": "external", "settings": {"command": ["true"]}}}
    off, on = (Config.model_validate({"envs": envs, "memory": {"recall": recall}}) for recall in (False, True))
    assert off.worlds == {"sums": ("arithmetic", {}), "own": ("external", {"command": ["true"]})}
    assert on.worlds["own"] == off.worlds["own"] and on.worlds["sums"][0].endswith(":Recalling")
    off_tasks = TaskSource(off, {name: make("arithmetic", {}, name=name) for name in envs})
    assert not entries_of(off_tasks.group(3))
    assert set(make_environments(Config.model_validate({"envs": {"sums": {"type": "arithmetic"}}}))) == {"sums"}


def test_a_world_that_wants_no_notes_has_none() -> None:
    envs = {"sums": {"type": "arithmetic"}, "bare": {"type": "arithmetic", "recall": False}}
    config = Config.model_validate({"envs": envs, "memory": {"recall": True}})
    assert config.worlds["bare"] == ("arithmetic", {}) and config.worlds["sums"][0].endswith(":Recalling")


def test_what_another_process_has_admitted_since_is_recalled(tmp_path: Path, shoal_home: Path) -> None:
    folder = tmp_path / "shared"
    config = Config.model_validate(
        {"envs": {"sums": {"type": "arithmetic"}}, "memory": {"recall": True, "folder": str(folder), "share": 1.0}}
    )
    kind, settings = config.worlds["sums"]
    env = make(kind, {**settings, "model": ""}, name="sums")
    assert not entries_of(env.task("train", 0, 0))
    with Keeper(folder, "n") as other:
        entry = other.add(make_entry(TEXT))
        assert other.report(entry.id, noisy_trials(0.5, 200, 1)).verdict == "accept"
    assert any(entry.id in entries_of(env.task("train", number, 0)) for number in range(8))
    keeper_of(str(folder)).close()
    keeper_of.cache_clear()


def test_a_world_that_has_to_wait_cannot_recall(memories: Path) -> None:
    settings = {"tasks": "test_recalling:Waits", "folder": str(memories), "share": 1.0}
    env = make("shoal.memory.recalling:Recalling", settings, name="waits")
    with pytest.raises(ConfigError, match="at once"):
        env.task("train", 0, 0)


async def test_addresses_and_numbers_in_notes_count_as_read() -> None:
    address = "0x52908400098527886E0F7030069857D2E4169EE7"
    evm = make("evm", {"groups": ["native"], "prompt": "brief", "constrain": "seen"}, name="evm")
    task = evm.task("train", 0, 0)
    bare = await evm.reset(task)
    shown = shown_with(evm, bare, f"the mill has {address}")
    assert bare.grammar is not None and shown.grammar is not None
    assert address not in bare.grammar.text and address in shown.grammar.text
    await evm.close()
    tools = make("shoal.agents.environment:ToolUse", {"constrain": "seen"}, name="tools")
    task = tools.task("train", 0, 0)
    bare = await tools.reset(task)
    shown = shown_with(tools, bare, "it was 987654 once")
    assert bare.grammar is not None and shown.grammar is not None
    assert "987654" not in bare.grammar.text and "987654" in shown.grammar.text
    assert noted(task, "") is task


class Waits(FirstDigit):
    """An environment that waits for something before it asks."""

    async def reset(self, task: object) -> object:  # type: ignore[override]
        import asyncio

        await asyncio.sleep(0.01)
        return await super().reset(task)  # type: ignore[arg-type]
