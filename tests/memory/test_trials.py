"""Trials: which they are is settled before they are run; they admit what helps, and go on where they were cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_arenas import FAMILY, HARMS, HELPS, NOTHING, advice, make_arena

from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.recall import PREFACE
from shoal.memory.replay import ReplayVoid
from shoal.memory.trials import Arena, admit


async def test_a_trial_is_the_same_whoever_runs_it_and_never_on_the_task_it_came_from(
    arena: Arena, tiny_model: Path
) -> None:
    entry = advice(HELPS)
    elsewhere = make_arena(tiny_model)
    for number in range(8):
        trial = await arena.run(entry, "asker", number)
        assert trial == await elsewhere.run(entry, "asker", number)
        assert trial.id == arena.id_of(entry, "asker", number) != arena.id_of(entry, "another", number)
        assert trial.task.id != entry.source_task and trial.task.env == FAMILY
        assert trial.with_memory.reward == 1.0 and trial.with_memory.tokens > trial.without.tokens
    shown = arena.sampler.prompts  # type: ignore[attr-defined]
    assert sum("digit" in prompt for prompt in shown) == 8 and len(shown) == 16
    # The tiny tokenizer knows no angle brackets.
    assert all(("recalled-memory" in prompt) == ("digit" in prompt) for prompt in shown)
    assert any(PREFACE[:20] in prompt for prompt in shown)


async def test_runs_without_a_memory_are_made_once_for_all_candidates(arena: Arena) -> None:
    await arena.run(advice(HELPS), "asker", 1)
    await arena.run(advice(NOTHING), "asker", 1)
    assert len(arena.sampler.prompts) == 3  # type: ignore[attr-defined]


async def test_what_helps_is_admitted_and_what_harms_is_not(arena: Arena, tmp_path: Path) -> None:
    with Keeper(tmp_path, "asker") as keeper:
        good, bad, idle = (keeper.add(advice(text)).id for text in (HELPS, HARMS, NOTHING))
        decision = await admit(keeper, arena, good)
        assert decision.verdict == "accept" and keeper.memory(good).status == "active"
        assert keeper.memory(good).weight == pytest.approx(decision.mean)
        assert (await admit(keeper, arena, bad)).verdict == "reject"
        assert (await admit(keeper, arena, idle)).verdict == "reject"
        assert [one.memory.id for one in keeper.search("reply", family=FAMILY)] == [good]
        assert not keeper.undo_false_claims()


async def test_trials_that_were_cut_off_go_on_and_none_is_run_twice(tiny_model: Path, tmp_path: Path) -> None:
    with Keeper(tmp_path, "asker") as keeper:
        entry = keeper.add(advice(HELPS)).id
        decision = await admit(keeper, make_arena(tiny_model), entry, parallel=2, most=4)
        assert decision.verdict == "continue" and decision.num_trials == 4
        before = set(keeper.store.trials(keeper.memory(entry)))
        second = make_arena(tiny_model)
        decision = await admit(keeper, second, entry, parallel=2)
        assert decision.verdict == "accept"
        after = keeper.store.trials(keeper.memory(entry))
        assert before < set(after)
        assert len(second.sampler.prompts) == 2 * (len(after) - 4)  # type: ignore[attr-defined]


async def test_a_memory_of_another_family_or_without_room_has_no_trials(arena: Arena, tmp_path: Path) -> None:
    with Keeper(tmp_path, "asker") as keeper:
        long = keeper.add(advice("Begin with a digit. " * 100))
        with pytest.raises(ReplayVoid, match="does not fit"):
            await admit(keeper, arena, long.id)
        arena.env.name = "other"
        with pytest.raises(ConfigError, match="about 'digit'"):
            await admit(keeper, arena, long.id)
