"""A worker that reports what it likes, beside an honest one: what is trained on is what honest ones would have made."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from made import config, episode, new_control, report, void

from shoal.coordinator.control import MAX_VOID_ATTEMPTS, Control
from shoal.planning.activation import Offer
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease, Submission

STEPS = 8
LONG_S = 10.0
"""Between two leases: nobody has to wait for having brought nothing."""

Report = Callable[[Lease], tuple[Episode, ...] | None]
"""What a worker hands in of a lease; `None`: nothing, as if it had died."""


def make(path: Path) -> Control:
    changes = {"eval__before": False, "eval__after": False, "run__steps": STEPS}
    control = new_control(config(path, **changes), path / "runs" / "tiny")
    control.stepped(report(0, metrics=False), {})
    return control


def drawn(lease: Lease, node: str) -> tuple[Episode, ...]:
    """What a sampler makes of the leased seeds: one answer in two is right, and the worker has no say in it."""
    return tuple(episode(lease, index, node, text="7" if seed % 2 else "x") for index, seed in enumerate(lease.seeds))


def takes_what_it_draws(lease: Lease) -> tuple[Episode, ...]:
    return drawn(lease, "picker")


def leaves_out_what_it_dislikes(lease: Lease) -> tuple[Episode, ...] | None:
    return tuple(one for one in drawn(lease, "picker") if one.reward > 0) or None


def gives_up_what_it_dislikes(lease: Lease) -> tuple[Episode, ...]:
    return tuple(
        one if one.reward > 0 else void(lease, index, "picker") for index, one in enumerate(drawn(lease, "picker"))
    )


def gives_up_groups_it_dislikes(lease: Lease) -> tuple[Episode, ...]:
    """In the hope of another draw."""
    mine = drawn(lease, "picker")
    if mean(one.reward for one in mine) > 0.5:
        return mine
    return tuple(void(lease, index, "picker") for index in range(len(mine)))


def vanishes_with_groups_it_dislikes(lease: Lease) -> tuple[Episode, ...] | None:
    mine = drawn(lease, "picker")
    return mine if mean(one.reward for one in mine) > 0.5 else None


def trained(path: Path, reports: Report) -> list[tuple[str, int, float]]:
    """Group, index and reward of all that a run trains on. Each group goes to the picker up to four times."""
    control, found, now = make(path), [], 0.0
    tries = Counter[str]()

    def hand_in(held: Lease, episodes: tuple[Episode, ...], node: str) -> None:
        asyncio.run(control.submit(Submission(lease=held.id, node_id=node, episodes=episodes), node, now))

    for step in range(STEPS):
        while (batch := control.batch(step, now).episodes) is None:
            now += LONG_S
            turn = "picker" if not control.queue.pending or tries[f"g{control.queue.pending[0]}"] < 4 else "honest"
            held = control.lease(turn, 64, now).lease
            assert held is not None
            tries[held.group] += 1
            if turn == "honest":
                hand_in(held, drawn(held, "honest"), "honest")
            elif (episodes := reports(held)) is not None:
                hand_in(held, episodes, "picker")
            else:
                control.node_left("picker", "died")
        found += [(one.group, one.index, one.reward) for one in batch]
        control.stepped(report(step + 1), {})
    assert control.failure is None
    return sorted(found)


PICKERS = [
    *(leaves_out_what_it_dislikes, gives_up_what_it_dislikes),
    *(gives_up_groups_it_dislikes, vanishes_with_groups_it_dislikes),
]


@pytest.mark.parametrize("reports", PICKERS[:2], ids=lambda reports: reports.__name__)
def test_who_keeps_back_what_it_dislikes(tmp_path: Path, reports: Report) -> None:
    _changes_nothing(tmp_path, reports)


@pytest.mark.parametrize("reports", PICKERS[2:], ids=lambda reports: reports.__name__)
def test_who_wants_another_draw(tmp_path: Path, reports: Report) -> None:
    _changes_nothing(tmp_path, reports)


def _changes_nothing(tmp_path: Path, reports: Report) -> None:
    honest, picked = trained(tmp_path / "honest", takes_what_it_draws), trained(tmp_path / "picked", reports)
    expected, found = (mean(reward for _, _, reward in one) for one in (honest, picked))
    assert found <= expected + 0.01, "it chose what is learnt"
    assert picked == honest


def test_who_gives_everything_up_does_not_end_the_run(tmp_path: Path) -> None:
    """It is quicker than those who work, so the same group comes back to it again and again."""
    control = make(tmp_path)
    control.trust.is_own = lambda _: False
    control.provisioning.see([Offer(name, rate=0.0, price_usd_per_hour=0.0) for name in ("honest", "picker")], 0.0)
    groups = Counter[str]()
    for attempt in range(2 * MAX_VOID_ATTEMPTS):
        held = control.lease("picker", 64, attempt * LONG_S).lease
        assert control.failure is None, "one worker's word ended the run"
        assert held is not None
        groups[held.group] += 1
        nothing = tuple(void(held, index, "picker") for index in range(len(held.tasks)))
        asyncio.run(
            control.submit(Submission(lease=held.id, node_id="picker", episodes=nothing), "picker", attempt * LONG_S)
        )
    assert max(groups.values()) >= MAX_VOID_ATTEMPTS and control.failure is None
    # A second worker's word settles it: then it is the group that cannot be done.
    held = control.lease("honest", 64, 1000.0).lease
    assert held is not None and held.group in groups
    nothing = tuple(void(held, index, "honest") for index in range(len(held.tasks)))
    asyncio.run(control.submit(Submission(lease=held.id, node_id="honest", episodes=nothing), "honest", 1000.0))
    assert control.failure is not None and "failed" in str(control.failure)
