"""A run's agent reads what is remembered for its task, as marked data, and keeps those notes when it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_cases import House, answer, turns

from shoal.agents.builtin.memories import notes_from
from shoal.agents.scheduler.policy import View
from shoal.agents.scheduler.prompt import messages
from shoal.agents.scheduler.records import Decision
from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.records import Entry, Provenance, Run, Trial
from shoal.memory.screening import RECALLED_CLOSE, RECALLED_OPEN
from shoal.protocol.episode import Task

TEXT = "Ask the north register for prices of the kestrel shop."


@pytest.fixture
def memories(tmp_path: Path, shoal_home: Path) -> Path:
    with Keeper(tmp_path / "m", "n") as keeper:
        entry = keeper.add(Entry(text=TEXT, family="shops", provenance=Provenance(rule="manual")))
        trials = [
            Trial(
                task=Task(env="shops", id=f"t{n}", seed=n),
                sampling_seed=n,
                model="m",
                config="c",
                without=Run(reward=0.0, steps=1, tokens=9),
                with_memory=Run(reward=1.0, steps=1, tokens=9),
            )
            for n in range(40)
        ]
        assert keeper.report(entry.id, trials).verdict == "accept"
    return tmp_path / "m"


async def test_notes_stand_before_the_task_and_in_the_log(memories: Path, tmp_path: Path) -> None:
    seen: list[View] = []

    def look(view: View) -> Decision:
        seen.append(view)
        return answer("12")

    recall = notes_from(memories)
    async with House(tmp_path, [], turns(look), recall=recall) as house:
        events = await house.run("What does a lamp cost at the kestrel shop?")
        assert house.runs.state(events[0].run).notes == seen[0].notes
    notes = seen[0].notes
    assert notes.startswith(RECALLED_OPEN) and notes.endswith(RECALLED_CLOSE) and TEXT in notes
    assert events[0].data["notes"]["entries"]
    for form in ("brief", "full"):
        said = messages(seen[0], form)[-1]  # type: ignore[arg-type]
        assert said.role == "user" and said.content == f"{notes}\n\nTask: {seen[0].task}"
    with pytest.raises(ConfigError, match="no memories"):
        notes_from(tmp_path / "nowhere")


async def test_a_run_without_memories_has_no_notes(tmp_path: Path) -> None:
    async with House(tmp_path, [], turns(answer("12"))) as house:
        events = await house.run("anything")
    assert "notes" not in events[0].data
