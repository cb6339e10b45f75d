"""Fault scripts: the same for the same seed, and never two faults at one node at once."""

from __future__ import annotations

from itertools import combinations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

import _chaos_script as scripts
from _chaos_script import FAULTS, KINDS, NODES, PARTS, REST_S, SECONDS, Fault, Script, check, draw

seeds = st.integers(0, 2**32)
some_kinds = st.sets(st.sampled_from(sorted(KINDS)), min_size=1)


@given(seed=seeds, kinds=some_kinds)
def test_a_script_is_sound_and_the_same_each_time(seed: int, kinds: set[str]) -> None:
    script = draw(seed, kinds)
    assert script == draw(seed, sorted(kinds, reverse=True))
    assert check(script) == ""
    assert 1 <= len(script.faults) <= FAULTS[1]
    assert {fault.kind for fault in script.faults} <= kinds
    assert [fault.at_s for fault in script.faults] == sorted(fault.at_s for fault in script.faults)
    for fault in script.faults:
        kind = KINDS[fault.kind]
        assert fault.targets in kind.targets and fault.amount in kind.amounts
        assert kind.for_s[0] - 1e-3 <= fault.for_s <= kind.for_s[1] + 1e-3
        assert 0 <= fault.at_s <= fault.end_s <= SECONDS + 1e-3
        assert fault.nodes <= set(NODES)


@given(seed=seeds)
def test_no_node_is_struck_twice_at_once(seed: int) -> None:
    for one, other in combinations(draw(seed).faults, 2):
        if one.nodes & other.nodes:
            first, second = sorted((one, other), key=lambda fault: fault.at_s)
            assert second.at_s >= first.end_s + REST_S


@given(seed=seeds)
def test_a_script_replays_from_its_json(seed: int) -> None:
    script = draw(seed)
    assert msgspec.json.decode(msgspec.json.encode(script), type=Script) == script


def test_sixty_seeds_strike_with_every_kind_and_different_nodes_at_once() -> None:
    drawn = [draw(seed) for seed in range(60)]
    assert {fault.kind for script in drawn for fault in script.faults} == set(KINDS) and len(KINDS) >= 15
    at_once = [
        script
        for script in drawn
        for one, other in combinations(script.faults, 2)
        if one.at_s < other.end_s and other.at_s < one.end_s
    ]
    assert len(at_once) >= 10
    assert len({script.faults for script in drawn}) == 60


def test_what_cannot_be_carried_out_is_named() -> None:
    def problem(**changes: object) -> str:
        fault = msgspec.structs.replace(Fault("pause", ("server",), 1.0, 2.0), **changes)
        return check(Script(0, 20.0, (fault,)))

    assert problem() == ""
    assert "no fault 'earthquake'" in problem(kind="earthquake")
    assert "cannot strike moon" in problem(targets=("moon",))
    assert "not within" in problem(at_s=19.0)
    assert "not within" in problem(for_s=0.0)


def test_every_kind_strikes_what_the_swarm_has() -> None:
    for name, kind in KINDS.items():
        for targets in kind.targets:
            assert set(targets) <= set(NODES) | set(PARTS), name
            assert Fault(name, targets, 0.0, 1.0).nodes <= set(NODES)
    assert set(scripts.WEATHERS) < set(KINDS)
