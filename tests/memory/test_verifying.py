"""Another node's memory is shown only once this one has replayed it; what was made up is taken back, for everybody."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_arenas import FAMILY, HARMS, HELPS, NOTHING, advice, make_arena

from shoal.fabric.identity import Identity
from shoal.memory.admission import decide, discovery_level, gain
from shoal.memory.events import Decided, Tried
from shoal.memory.evolution import DEMOTE_AT
from shoal.memory.keeper import Keeper
from shoal.memory.records import Entry, Run, Trial
from shoal.memory.trials import admit
from shoal.memory.verifying import verify
from shoal.protocol.episode import Task


def carry(source: Keeper, target: Keeper) -> None:
    target.receive(source.store.events_since(0, 10_000)[0])


def made_up(keeper: Keeper, entry: Entry) -> str:
    """A claim with evidence that was never run, and that fits to the last digit."""
    memory = keeper.add(entry)
    runs = (Run(reward=0.0, steps=1, tokens=50), Run(reward=1.0, steps=1, tokens=60))
    trials = [
        Trial(
            task=Task(env=FAMILY, id=f"train-{n}", seed=0),
            sampling_seed=n,
            model="weights",
            config="elsewhere",
            without=runs[0],
            with_memory=runs[1],
        )
        for n in range(1, 41)
    ]
    number = keeper.store.number_of(memory.id)
    gains = [gain(trial, keeper.policy) for trial in trials]
    decision = decide(gains, level=discovery_level(number, 0, keeper.policy.false_discovery_rate), policy=keeper.policy)
    assert decision.verdict == "accept"
    claim = Decided(
        entry=memory.id,
        accepted=True,
        reason="helps",
        weight=decision.mean,
        candidate=number,
        discoveries=0,
        num_trials=40,
        log_e=decision.log_e,
    )
    keeper.store.record(*(Tried(entry=memory.id, trial=trial) for trial in trials), claim)
    return memory.id


@pytest.mark.parametrize("weights", ["weights", "others"])
async def test_a_true_claim_is_vouched_for_after_trials_here(tiny_model: Path, tmp_path: Path, weights: str) -> None:
    with (
        Keeper(tmp_path / "a", Identity.generate()) as there,
        Keeper(tmp_path / "b", Identity.generate(), vouched_only=True) as here,
    ):
        entry = there.add(advice(HELPS)).id
        await admit(there, make_arena(tiny_model), entry)
        carry(there, here)
        assert here.memory(entry).status == "active" and not here.search("a digit first")
        # With the same weights some of its own trials are run again, with others fresh ones.
        arena = make_arena(tiny_model, weights=weights)
        found = await verify(here, arena, here.memory(entry), reruns=4)
        assert found.verdict == "vouched"
        assert (found.num_trials == 4) == (weights == "weights")
        assert [one.memory.id for one in here.search("a digit first")] == [entry]
        assert (await verify(here, arena, here.memory(entry))).reason == "known"
        carry(here, there)
        assert there.memory(entry) == here.memory(entry) and len(there.memory(entry).vouched) == 2
    with Keeper(tmp_path / "b", Identity.generate(), vouched_only=True) as stranger:
        assert not stranger.search("a digit first")


@pytest.mark.parametrize("text", [HARMS, NOTHING])
async def test_evidence_that_was_made_up_passes_an_audit_and_no_replay(
    tiny_model: Path, tmp_path: Path, text: str
) -> None:
    with (
        Keeper(tmp_path / "a", Identity.generate()) as liar,
        Keeper(tmp_path / "b", Identity.generate(), vouched_only=True) as here,
    ):
        entry = made_up(liar, advice(text))
        carry(liar, here)
        assert here.memory(entry).status == "active" and not here.undo_false_claims()
        found = await verify(here, make_arena(tiny_model), here.memory(entry))
        assert found.verdict == "false" and found.num_trials > 0
        assert here.memory(entry).status == "candidate" and not here.search("reply")
        carry(here, liar)
        assert liar.memory(entry).status == "candidate"


async def test_a_claim_whose_numbers_do_not_fit_is_undone_without_a_replay(tiny_model: Path, tmp_path: Path) -> None:
    with Keeper(tmp_path / "a", "liar") as liar, Keeper(tmp_path / "b", "here", vouched_only=True) as here:
        memory = liar.add(advice(HELPS))
        claim = Decided(
            entry=memory.id,
            accepted=True,
            reason="helps",
            weight=1.0,
            candidate=1,
            discoveries=0,
            num_trials=9,
            log_e=9.0,
        )
        liar.store.record(claim)
        carry(liar, here)
        arena = make_arena(tiny_model)
        found = await verify(here, arena, here.memory(memory.id))
        assert found.verdict == "false" and "0 trials" in found.reason
        assert not arena.sampler.prompts  # type: ignore[attr-defined]


async def test_a_merge_is_vouched_for_only_where_all_that_it_pooled_is(tiny_model: Path, tmp_path: Path) -> None:
    texts = (HELPS, f"{HELPS} Always.")
    with (
        Keeper(tmp_path / "a", Identity.generate()) as there,
        Keeper(tmp_path / "b", Identity.generate(), vouched_only=True) as here,
        Keeper(tmp_path / "c", Identity.generate(), vouched_only=True) as other,
    ):
        first, second = (made_up(there, advice(text)) for text in texts)
        carry(there, here)
        assert (await verify(here, make_arena(tiny_model), here.memory(first))).verdict == "vouched"
        assert there.maintain() > 0 and there.memory(first).id == there.memory(second).id
        carry(there, here)
        carry(there, other)
        merged = here.memory(first)
        assert merged.vouched == (there.store.node,) and len(merged.members) == 2
        # One of the two was never tried here: the merged one is.
        found = await verify(here, make_arena(tiny_model), merged)
        assert found.verdict == "vouched" and found.num_trials > 0
        assert (await verify(other, make_arena(tiny_model), other.memory(first))).num_trials > 0


def test_poison_that_is_shown_unchecked_is_demoted_within_eleven_uses(tmp_path: Path) -> None:
    with Keeper(tmp_path / "a", "liar") as liar, Keeper(tmp_path / "b", "here") as here:
        entry = made_up(liar, advice(HARMS))
        carry(liar, here)
        uses = 0
        while here.memory(entry).status == "active":
            here.used([entry], -1.0)
            uses += 1
        assert uses <= 11 and here.memory(entry).loss <= DEMOTE_AT + 1
        assert not here.search("reply")
