"""Who is checked, who waits for it, and what follows: the control with a hand in the learner's place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made import config, new_control, report, submission, turn
from msgspec.structs import replace

from shoal.coordinator import trust
from shoal.coordinator.control import Control
from shoal.coordinator.trust import HOLD_S, MAX_HELD
from shoal.coordinator.verification import Limits, verdicts
from shoal.envs.base import Observation
from shoal.planning.standing import EXCLUDE_AT, FIRST_EXCLUSION_S
from shoal.protocol.codec import encode
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Grammar
from shoal.protocol.trust import Claim, Finding
from shoal.protocol.work import Lease
from tiny import FirstDigit

SIZE = 4


def strict(tmp_path: Path, **changes: Any) -> Control:
    """A run whose workers all come from outside, with two groups of probation."""
    given = {"eval__before": False, "eval__after": False, "run__steps": 100, "trust__probation": 2 * SIZE} | changes
    control = new_control(config(tmp_path, **given), tmp_path / "runs" / "tiny")
    control.trust.is_own = lambda _: False
    control.stepped(report(0, metrics=False), {})
    return control


def hand_in(control: Control, node: str = "ann", now: float = 0.0, **more: Any) -> tuple[Lease, set[str]]:
    lease = control.lease(node, 64, now).lease
    assert lease is not None
    return lease, set(asyncio.run(control.submit(submission(lease, node, **more), node, now)).values())


def good(claim: Claim) -> Finding:
    return Finding(episode=claim.episode.id, tokens=2, variance=1.0)


def bad(claim: Claim) -> Finding:
    return Finding(episode=claim.episode.id, tokens=2, displacement=0.4, variance=1.0)


def look(control: Control, finding: Any = good, now: float = 0.0) -> int:
    """Check all that waits; gives how many episodes that were."""
    done = 0
    while claims := control.trust.take():
        control.checked(control.trust.found([finding(claim) for claim in claims], now), now)
        done += len(claims)
    assert control.book.is_conserved
    return done


def test_a_newcomers_groups_count_once_they_are_checked(tmp_path: Path) -> None:
    control = strict(tmp_path)
    lease, told = hand_in(control)
    assert told == {"checking"} and not control.queue.buffered and lease.id in control.book.running
    again = asyncio.run(control.submit(submission(lease, "ann"), "ann", 1.0))
    assert set(again.values()) == {"checking"}, "an answer that was lost is given again"
    claims = control.trust.take()
    assert [c.seed for c in claims] == list(lease.seeds) and claims[0].opening[0].content == claims[0].episode.turns[
        0
    ].observation
    assert control.trust.take() == claims, "handed out until the findings come"
    control.checked(control.trust.found([good(c) for c in claims[:3]], 0.0), 0.0)
    assert not control.queue.buffered, "a group is decided as a whole"
    control.checked(control.trust.found([good(claims[3]), good(claims[3])], 0.0), 0.0)
    assert list(control.queue.buffered) == [0] and control.book.counts["accepted"] == SIZE
    late = asyncio.run(control.submit(submission(lease, "ann"), "ann", 1.0))
    assert set(late.values()) == {"duplicate"}


def test_a_trusted_workers_groups_count_at_once_and_some_are_checked(tmp_path: Path) -> None:
    control = strict(tmp_path)
    draws = iter([0.05, 0.5])
    control.trust._draw = lambda: next(draws)
    for _ in range(2):
        assert hand_in(control)[1] == {"checking"}
        look(control)
    assert control.trust.state("ann", 0.0) == "trusted"
    assert [hand_in(control)[1] for _ in range(2)] == [{"accepted"}, {"accepted"}]
    assert look(control) == SIZE, "the one that was drawn below `sample`"
    assert control.book.counts["accepted"] == 4 * SIZE


def test_a_workers_death_does_not_undo_what_it_handed_in(tmp_path: Path) -> None:
    control = strict(tmp_path)
    hand_in(control)
    control.node_left("ann", "died")
    look(control)
    assert list(control.queue.buffered) == [0] and control.book.counts["void"] == 0


def test_what_nobody_checks_is_leased_again(tmp_path: Path) -> None:
    control = strict(tmp_path)
    lease, _ = hand_in(control)
    control.tick(HOLD_S - 1)
    assert lease.id in control.book.running
    control.tick(HOLD_S)
    assert control.book.counts["expired"] == SIZE and control.queue.pending == [0] and not control.trust.take()
    assert control.book.is_conserved


def test_newcomers_wait_while_much_of_theirs_is_unchecked(tmp_path: Path) -> None:
    control = strict(tmp_path, rollout__groups_per_step=8)
    for _ in range(MAX_HELD):
        hand_in(control)
    assert control.lease("ann", 64, 0.0).lease is None
    assert control.why_idle("ann", 0.0) == ("parked", "its first rollouts are being checked")
    assert control.lease("bob", 64, 0.0).lease is not None, "others do not wait for it"
    look(control)
    assert control.lease("ann", 64, 0.0).lease is not None


def test_a_liar_is_excluded_and_nothing_of_it_trains(tmp_path: Path) -> None:
    control = strict(tmp_path)
    now = 0.0
    for _ in range(int(EXCLUDE_AT)):
        _, told = hand_in(control, "mallory", now)
        assert told == {"checking"}
        look(control, bad, now)
        now += 10.0
    assert control.lease("mallory", 64, now).lease is None and control.trust.state("mallory", now) == "excluded"
    assert control.why_idle("mallory", now)[1].startswith("what it handed in was not what it claimed")
    assert not control.queue.buffered and control.queue.counts["accepted"] == 0
    assert control.book.counts["rejected"] == 3 * SIZE
    assert control.failure is None, "its rejected groups do not end the run"
    assert control.lease("mallory", 64, now + FIRST_EXCLUSION_S).lease is not None, "it may try again"


def test_a_turncoats_unconsumed_groups_are_swept(tmp_path: Path) -> None:
    control = strict(tmp_path, trust__sample=1.0, rollout__groups_per_step=16)
    for _ in range(2):
        hand_in(control, "mallory")
        look(control)
    honest, _ = hand_in(control, "bob")
    look(control)
    assert hand_in(control, "mallory")[1] == {"accepted"}, "trusted by now"
    held, _ = hand_in(control, "eve")
    look(control, lambda c: good(c) if c.episode.worker != "mallory" else bad(c))
    for now in (10.0, 20.0):
        hand_in(control, "mallory", now)
        look(control, bad, now)
    assert control.trust.state("mallory", 20.0) == "excluded"
    assert sorted(control.queue.buffered) == [int(honest.group[1:]), int(held.group[1:])]
    counts = control.queue.counts
    assert counts["accepted"] == counts["swept"] + len(control.queue.buffered) and counts["swept"] == 3


def test_of_groups_that_are_decided_together_none_of_an_excluded_worker_counts(tmp_path: Path) -> None:
    control = strict(tmp_path, rollout__groups_per_step=8)
    leases = [hand_in(control, "mallory")[0] for _ in range(int(EXCLUDE_AT) + 1)]
    lies = {lease.id for lease in leases[:-1]}
    claims = control.trust.take()
    assert len(claims) == SIZE * len(leases)
    findings = [(bad if c.episode.id.partition("/")[0] in lies else good)(c) for c in claims]
    control.checked(control.trust.found(findings, 0.0), 0.0)
    assert control.trust.state("mallory", 0.0) == "excluded"
    assert not control.queue.buffered and control.queue.counts["accepted"] == 0
    assert control.book.counts["void"] == SIZE and control.book.is_conserved and not control.book.running


def test_more_than_was_leased_is_not_held(tmp_path: Path) -> None:
    control = strict(tmp_path)
    lease = control.lease("ann", 64, 0.0).lease
    assert lease is not None
    honest = submission(lease, "ann")
    praise = replace(honest.episodes[0], id="unleased", reward=1e6)
    told = asyncio.run(control.submit(replace(honest, episodes=(*honest.episodes, praise)), "ann", 0.0))
    assert set(told) == {e.id for e in honest.episodes}
    assert look(control) == SIZE and list(control.queue.buffered) == [0]


def test_claims_fit_a_message_whatever_is_handed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = strict(tmp_path)
    hand_in(control, texts=("7 " * 1000,))
    whole = control.trust.take()
    assert len(whole) == SIZE
    for room, fit in ((1, 1), (2 * len(encode(whole[0])), 2)):
        monkeypatch.setattr(trust, "BYTES_AT_ONCE", room)
        assert control.trust.take() == whole[:fit]
    assert look(control) == SIZE and list(control.queue.buffered) == [0], "each has its turn"


def test_a_wrong_reward_costs_standing_too(tmp_path: Path) -> None:
    control = strict(tmp_path)
    now = 0.0
    for _ in range(int(EXCLUDE_AT)):
        lease = control.lease("mallory", 64, now).lease
        assert lease is not None
        handed = submission(lease, "mallory")
        inflated = replace(handed, episodes=tuple(replace(e, reward=2.0) for e in handed.episodes))
        assert set(asyncio.run(control.submit(inflated, "mallory", now)).values()) == {"rejected"}
        now += 10.0
    assert control.trust.state("mallory", now) == "excluded" and control.failure is None


def test_own_workers_are_not_checked_unless_asked_for(tmp_path: Path) -> None:
    control = strict(tmp_path)
    control.trust.is_own = lambda node_id: node_id == "local-0"
    assert hand_in(control, "local-0")[1] == {"accepted"}
    assert control.trust.facts() == {}
    other = strict(tmp_path / "other", trust__own=True)
    other.trust.is_own = lambda _: True
    assert hand_in(other, "local-0")[1] == {"checking"}
    off = strict(tmp_path / "off", trust__check=False)
    assert hand_in(off)[1] == {"accepted"}


def test_a_version_that_is_gone_is_void_and_costs_nothing(tmp_path: Path) -> None:
    control = strict(tmp_path)
    hand_in(control)
    look(control, lambda c: Finding(episode=c.episode.id, gone=True))
    assert control.book.counts["void"] == SIZE and control.queue.pending == [0]
    assert control.trust.account("ann")["suspicion"] == 0


def _turned(episode: Episode, **changes: Any) -> Episode:
    (turn,) = episode.turns
    return replace(episode, turns=(replace(turn, completion=replace(turn.completion, **changes)),))


LIES: dict[str, tuple[str, Callable[[Episode], Episode]]] = {
    "long-winded": ("longer than its tokens can say", lambda e: _turned(e, text="7" * 2049)),
    "cut off early": ("had room for 8", lambda e: _turned(e, finish="length")),
    "going back": ("versions go back", lambda e: _turned(e, versions=(1, 0))),
    "another observation": (
        "another observation",
        lambda e: replace(e, turns=(replace(e.turns[0], observation="6 or 7?"),)),
    ),
    "two conversations": (
        "not one conversation",
        lambda e: replace(e, turns=(*e.turns, replace(e.turns[0], after=-1))),
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_tiers_without_weights(tmp_path: Path, kind: str) -> None:
    words, lie = LIES[kind]
    control = strict(tmp_path)
    lease = control.lease("ann", 64, 0.0).lease
    assert lease is not None
    told = [lie(e) for e in submission(lease, "ann").episodes]
    environments = {"digit": FirstDigit(name="digit")}
    judged = asyncio.run(verdicts(lease, told, "ann", 1, Limits(64, 82), environments))
    assert [verdict for verdict, _ in judged] == ["rejected"] * SIZE
    assert all(words in played.problem for _, played in judged), judged[0][1].problem


class Bound(FirstDigit):
    """Wants a digit."""

    async def reset(self, task: Task) -> Observation:
        return Observation((await super().reset(task)).messages, Grammar(kind="regex", text="[0-9]"))


@pytest.mark.parametrize(
    ("env", "words"), [(Bound, "not constrained by the grammar"), (FirstDigit, "")], ids=["bound", "free"]
)
def test_the_grammar_is_the_environments(tmp_path: Path, env: type[FirstDigit], words: str) -> None:
    control = strict(tmp_path)
    lease = control.lease("ann", 64, 0.0).lease
    assert lease is not None
    judged = asyncio.run(
        verdicts(lease, submission(lease, "ann").episodes, "ann", 0, Limits(64, 82), {"digit": env(name="digit")})
    )
    for verdict, played in judged:
        assert (verdict == "rejected") == bool(words) and words in played.problem


class Shown(FirstDigit):
    """Acts in the agent's place, at length."""

    gives = True
    act = "7 and nothing else"

    async def reset(self, task: Task) -> Observation:
        return Observation((await super().reset(task)).messages, given=self.act)


def test_what_an_environment_gives_may_be_longer_than_what_is_drawn(tmp_path: Path) -> None:
    control = strict(tmp_path)
    lease = control.lease("ann", 64, 0.0).lease
    assert lease is not None
    length = lease.params.max_tokens + 1

    def judged(given: bool, limits: Limits) -> set[str]:
        episodes = []
        for e in submission(lease, "ann", texts=(Shown.act,)).episodes:
            (first,) = e.turns
            first = replace(turn(Shown.act, num_tokens=length, observation=first.observation), given=given)
            episodes.append(replace(e, turns=(first,)))
        environments = {"digit": Shown(name="digit")}
        return {v for v, _ in asyncio.run(verdicts(lease, episodes, "ann", 0, limits, environments))}

    assert judged(True, Limits(64, 82)) == {"accepted"}
    assert judged(False, Limits(64, 82)) == judged(True, Limits(length, 82)) == {"rejected"}


def test_random_histories_keep_the_books(tmp_path: Path) -> None:
    """Workers of all kinds, findings late and in any order, deaths and expiries."""
    rng = random.Random(5)
    control = strict(tmp_path, rollout__groups_per_step=4, rollout__lease_timeout_s=50.0)
    control.trust._draw = rng.random
    nodes, running, now, version = ["ann", "bob", "eve", "mallory"], [], 0.0, 0
    for _ in range(600):
        now += rng.random() * 3
        match rng.randrange(7):
            case 0 | 1:
                node = rng.choice(nodes)
                lease = control.lease(node, 64, now).lease
                if lease is not None:
                    running.append((lease, node))
            case 2 | 3 if running:
                lease, node = running.pop(rng.randrange(len(running)))
                asyncio.run(control.submit(submission(lease, node), node, now))
            case 4:
                claims = list(control.trust.take(8))
                rng.shuffle(claims)
                lies = {c.episode.id for c in claims if c.episode.worker == "mallory" and rng.random() < 0.5}
                findings = [(bad if c.episode.id in lies else good)(c) for c in claims[: rng.randint(0, 8)]]
                control.checked(control.trust.found(findings, now), now)
            case 5 if rng.random() < 0.1:
                control.node_left(rng.choice(nodes), "died")
            case 6:
                control.tick(now)
                if control.batch(version, now).episodes is not None:
                    version += 1
                    control.stepped(report(version), {})
            case _:
                pass
        assert control.book.is_conserved
        counts = control.queue.counts
        assert counts["accepted"] == counts["consumed"] + counts["swept"] + len(control.queue.buffered)
    assert version > 3 and control.trust.counts["rejected"] > 0 and control.trust.counts["exclusions"] >= 1
