"""The run's decisions: what is leased, what is believed, what trains, what is evaluated, when it is over."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made import config, episode, new_control, report, submission, turn, void
from msgspec.structs import replace

from shoal.coordinator.control import MAX_VOID_ATTEMPTS, Control
from shoal.coordinator.evaluation import MAX_FRUITLESS_LEASES
from shoal.coordinator.pauses import MAX_PAUSE_S
from shoal.coordinator.summary import summarise
from shoal.coordinator.verification import Limits, verdicts
from shoal.envs.base import Step
from shoal.errors import NetworkError
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease, Submission
from tiny import FirstDigit

NO_EVAL = {"eval__before": False, "eval__after": False}


def make(tmp_path: Path, **changes: Any) -> Control:
    return new_control(config(tmp_path, **{**NO_EVAL, **changes}), tmp_path / "runs" / "tiny")


def lease(control: Control, node: str = "ann", slots: int = 64, now: float = 0.0) -> Lease:
    found = control.lease(node, slots, now).lease
    assert found is not None
    return found


def submit(control: Control, what: Submission, node: str = "ann", now: float = 0.0) -> Counter[str]:
    return Counter(asyncio.run(control.submit(what, node, now)).values())


def act(control: Control, node: str = "ann", **more: Any) -> Lease:
    """Lease and submit honestly."""
    held = lease(control, node)
    assert set(submit(control, submission(held, node, **more), node)) == {"accepted"}
    return held


def test_nothing_is_leased_before_a_version_is_out(tmp_path: Path) -> None:
    control = make(tmp_path)
    assert control.lease("ann", 64, 0.0).lease is None
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    assert len(held.tasks) == len(set(held.seeds)) == 4, "a group repeats one task with seeds of its own"
    assert len({task.id for task in held.tasks}) == 1
    assert held.min_version == 0 and not held.exact_version


def test_a_group_needs_all_its_slots(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    for slots in (3, 0, -5):
        assert control.lease("ann", slots, 0.0).lease is None
    assert control.book.counts["leased"] == 0


@pytest.mark.parametrize(("mode", "exact"), [("async", False), ("pull", True), ("colocated", True)])
def test_only_async_rollouts_may_be_of_newer_versions(tmp_path: Path, mode: str, exact: bool) -> None:
    control = make(tmp_path, learner__mode=mode)
    control.stepped(report(0, metrics=False), {})
    assert lease(control).exact_version == exact


def _wrong_turn(**changes: Any) -> Callable[[Episode], Episode]:
    def tamper(e: Episode) -> Episode:
        first = e.turns[0]
        context = changes.get("context_ids", first.context_ids)
        completion = replace(first.completion, **{k: v for k, v in changes.items() if k != "context_ids"})
        return replace(e, turns=(replace(first, completion=completion, context_ids=context),))

    return tamper


TAMPERINGS: dict[str, tuple[Callable[[Episode], Episode], str]] = {
    "another task": (lambda e: replace(e, task=replace(e.task, id="train-63")), "task is not the leased one"),
    "another seed": (lambda e: replace(e, task=replace(e.task, seed=1)), "task is not the leased one"),
    "other data": (lambda e: replace(e, task=replace(e.task, data={"x": 1})), "task is not the leased one"),
    "another index": (lambda e: replace(e, index=3), "another episode"),
    "another group": (lambda e: replace(e, group="g77"), "another episode"),
    "another id": (lambda e: replace(e, id="someone's"), "another episode"),
    "another worker": (lambda e: replace(e, worker="bob"), "another worker"),
    "colder": (lambda e: replace(e, temperature=0.3), "temperature is 0.3"),
    "too many tokens": (
        lambda e: replace(e, turns=(turn(num_tokens=9),)),
        "9 tokens, not 1 to 8",
    ),
    "no tokens": (_wrong_turn(token_ids=(), logprobs=(), versions=()), "0 tokens"),
    "unfinished": (_wrong_turn(finish="cancelled"), "'cancelled'"),
    "unborn version": (_wrong_turn(versions=(1, 2)), "versions 1 to 2"),
    "older version": (_wrong_turn(versions=(0, 1)), "versions 0 to 1"),
    "beyond the vocabulary": (_wrong_turn(token_ids=(5, 82)), "beyond the vocabulary of 82"),
    "context beyond the vocabulary": (_wrong_turn(context_ids=(2, 10**6)), "beyond the vocabulary"),
    "longer than the context": (_wrong_turn(context_ids=(2,) * 63), "longer than the context of 64"),
    "a higher reward": (lambda e: replace(e, reward=1.5), "claims reward 1.5"),
    "a slightly higher reward": (lambda e: replace(e, reward=e.reward + 1e-3), "claims reward"),
    "no parts": (lambda e: replace(e, reward_parts={}), "parts are not"),
    "a better part": (lambda e: replace(e, reward_parts={"strict": 1.0, "lenient": 0.5}), "parts are not"),
    "an invented part": (lambda e: replace(e, reward_parts={**e.reward_parts, "genius": 1.0}), "parts are not"),
    "turns after the end": (lambda e: replace(e, turns=(*e.turns, e.turns[0])), "cannot be replayed"),
}


@pytest.mark.parametrize("name", list(TAMPERINGS))
def test_what_is_not_the_leased_episode_is_rejected(tmp_path: Path, name: str) -> None:
    tamper, reason = TAMPERINGS[name]
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    control.stepped(report(1), {})
    held = lease(control)
    honest = submission(held, "ann")
    episodes = (*honest.episodes[:2], tamper(honest.episodes[2]), *honest.episodes[3:])
    assert submit(control, replace(honest, episodes=episodes)) == {"rejected": 1, "void": 3}, "groups stay whole"
    assert control.book.counts["rejected"] == 1 and control.book.is_conserved
    assert control.queue.pending == [0] and not control.queue.buffered
    events = [json.loads(line) for line in (tmp_path / "runs/tiny/events.jsonl").read_text().splitlines()]
    assert any(e["kind"] == "rollout.refused" and reason in e["data"]["reason"] for e in events), events


def test_exact_leases_refuse_newer_versions(tmp_path: Path) -> None:
    control = make(tmp_path, learner__mode="pull")
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    control.stepped(report(1), {})
    assert submit(control, submission(held, "ann", version=1)) == {"rejected": 4}


def test_newer_versions_are_welcome_in_async(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    control.stepped(report(1), {})
    assert submit(control, submission(held, "ann", version=1)) == {"accepted": 4}
    assert control.queue.buffered == {0: 1}


def test_void_is_leased_again_and_never_a_reward(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    honest = submission(held, "ann")
    mixed = replace(honest, episodes=(*honest.episodes[:3], void(held, 3, "ann")))
    assert submit(control, mixed) == {"void": 4}
    assert control.queue.pending == [0] and not list((tmp_path / "runs/tiny/buffer").iterdir())
    again = lease(control, "bob")
    assert again.group == held.group and again.id != held.id
    assert (again.tasks, again.seeds) == (held.tasks, held.seeds)
    assert submit(control, submission(again, "bob"), "bob") == {"accepted": 4}


class _Unreachable(FirstDigit):
    """An environment on a server that is away."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        raise NetworkError("the environment's server does not answer.")


def test_what_cannot_be_played_again_now_is_nobodys_lie(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    episodes = submission(held, "ann").episodes
    for env, wanted in ((FirstDigit(name="digit"), "accepted"), (_Unreachable(name="digit"), "void")):
        judged = asyncio.run(verdicts(held, episodes, "ann", 0, Limits(64, 82), {"digit": env}))
        assert [verdict for verdict, _ in judged] == [wanted] * 4
        assert all(("does not answer" in played.problem) == (wanted == "void") for _, played in judged)


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_missing_episodes_are_void(tmp_path: Path, sent: int) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    honest = submission(held, "ann")
    assert submit(control, replace(honest, episodes=honest.episodes[:sent])) == ({"void": sent} if sent else {})
    assert control.book.counts["void"] == 4 and control.queue.pending == [0]


def test_more_episodes_than_were_leased_change_nothing(tmp_path: Path) -> None:
    control = make(tmp_path, rollout__groups_per_step=1)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    honest = submission(held, "ann")
    praise = replace(honest.episodes[0], id="unleased", reward=1e6, worker="bob")
    more = replace(honest, episodes=(*honest.episodes, praise))
    assert submit(control, more) == {"accepted": 4}
    assert control.book.counts["accepted"] == 4 and control.book.is_conserved
    assert control.batch(0, 0.0).episodes == honest.episodes, "nobody has looked at what comes beyond"


def test_late_repeated_and_foreign_submissions_change_nothing(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    what = submission(held, "ann")
    assert submit(control, replace(what, node_id="bob"), "bob") == {"late": 4}, "the sender counts, not what it says"
    assert submit(control, what) == {"accepted": 4}
    assert submit(control, what) == {"duplicate": 4}
    stuck = lease(control)
    control.tick(now=11.0)
    assert control.queue.pending == [1]
    assert submit(control, submission(stuck, "ann")) == {"late": 4}
    assert control.queue.pending == [1] and control.lost["expired"] == 1
    assert submit(control, replace(what, lease="g9.unknown")) == {"late": 4}
    assert control.book.is_conserved


async def test_the_same_submission_twice_at_once_counts_once(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    what = submission(held, "ann")
    verdicts = await asyncio.gather(*(control.submit(what, "ann", 0.0) for _ in range(3)))
    assert sorted(v for found in verdicts for v in set(found.values())) == ["accepted", "duplicate", "duplicate"]
    assert control.book.counts["accepted"] == 4 and control.queue.counts["accepted"] == 1


def test_a_lease_that_ends_while_it_is_checked_is_late(tmp_path: Path) -> None:
    class Slow(FirstDigit):
        async def step(self, action: str, *, truncated: bool = False) -> Any:
            control.tick(now=1000.0)
            return await super().step(action, truncated=truncated)

    control = make(tmp_path)
    control._envs["digit"] = Slow(name="digit")  # type: ignore[index]
    control.stepped(report(0, metrics=False), {})
    assert submit(control, submission(lease(control), "ann")) == {"late": 4}
    assert control.queue.pending == [0] and control.book.counts["expired"] == 4 and control.book.is_conserved


def test_a_worker_that_dies_loses_its_leases_and_no_other_does(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    mine, theirs = lease(control, "ann"), lease(control, "bob")
    control.node_left("ann", "died")
    assert control.queue.pending == [0] and control.queue.running == {1}
    assert control.heartbeat("ann", {mine.id: 5}, 1.0) == (mine.id,)
    assert control.heartbeat("bob", {theirs.id: 5}, 1.0) == ()
    assert submit(control, submission(theirs, "bob"), "bob") == {"accepted": 4}


def test_a_worker_whose_leases_bring_nothing_waits_longer_each_time(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    now, pauses = 0.0, []
    for _ in range(6):
        held = lease(control, now=now)
        submit(control, Submission(lease=held.id, node_id="ann", episodes=()), now=now)
        waited = now
        while control.lease("ann", 64, waited).lease is None:
            waited += 0.25
        control.node_left("ann", "test")
        pauses.append(waited - now)
        now = waited
    assert pauses == [0.5, 1, 2, 4, MAX_PAUSE_S, MAX_PAUSE_S]
    assert control.lease("bob", 64, 0.0).lease is not None, "others are served meanwhile"
    control.node_left("bob", "test")
    held = lease(control, now=now)
    submit(control, submission(held, "ann"), now=now)
    assert control.lease("ann", 64, now).lease is not None, "one success, and it is trusted again"


def test_a_broken_environment_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    for attempt in range(MAX_VOID_ATTEMPTS):
        assert not control.ended
        held = lease(control, f"node {attempt}")
        assert held.group == "g0"
        episodes = tuple(void(held, i, f"node {attempt}") for i in range(4))
        submit(control, Submission(lease=held.id, node_id="", episodes=episodes), f"node {attempt}")
    assert control.failure is not None and "the machine was on fire" in control.failure.problem
    assert control.lease("ann", 64, 0.0).ended and control.batch(0, 0.0).ended


# Evaluation


def test_an_evaluation_asks_each_question_once_and_survives_losses(tmp_path: Path) -> None:
    control = make(tmp_path, eval__before=True, eval__questions=60)
    control.stepped(report(0, metrics=False), {})
    rng = random.Random(1)
    nodes = ["ann", "bob", "cid"]
    for _ in range(200):
        if not control.evals.rounds:
            break
        node = rng.choice(nodes)
        found = control.lease(node, rng.randint(1, 40), 0.0).lease
        if found is None or found.kind == "train":
            continue
        assert found.exact_version and found.params.temperature == 0
        assert len({task.id for task in found.tasks}) == len(found.tasks)
        fate = rng.random()
        if fate < 0.2:
            control.node_left(node, "died")
            continue
        honest = submission(found, node)
        if fate < 0.4:
            episodes = [e if rng.random() < 0.5 else void(found, i, node) for i, e in enumerate(honest.episodes)]
            honest = replace(honest, episodes=tuple(episodes))
        elif fate < 0.6:
            honest = replace(honest, episodes=honest.episodes[: rng.randint(0, len(honest.episodes))])
        submit(control, honest, node, now=0.0)
        control._pauses.clear()
    assert control.evals.results[0]["questions"] == 60 and control.book.is_conserved
    answers = control.evals.answers(0)
    assert len({a["task"]["id"] for a in answers}) == 60
    assert control.evals.results[0]["strict"] == sum(a["strict"] for a in answers) / 60


def test_a_wrong_answer_is_not_evaluated(tmp_path: Path) -> None:
    control = make(tmp_path, eval__before=True, eval__questions=4)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    honest = submission(held, "ann", texts=("x",))
    lie = replace(honest.episodes[0], reward=1.0, reward_parts={"strict": 1.0, "lenient": 1.0})
    assert submit(control, replace(honest, episodes=(lie, *honest.episodes[1:]))) == {"rejected": 1, "accepted": 3}
    held = lease(control)
    assert len(held.tasks) == 1 and submit(control, submission(held, "ann", texts=("x",))) == {"accepted": 1}
    assert control.evals.results[0]["strict"] == 0.0


def test_an_evaluation_keeps_its_version(tmp_path: Path) -> None:
    control = make(tmp_path, eval__before=True, eval__every=2, run__steps=9)
    control.stepped(report(0, metrics=False), {})
    assert control.evals.oldest_version == 0
    for version in (1, 2, 3, 4):
        control.stepped(report(version), {})
    assert control.evals.oldest_version == 0 and sorted(control.evals.rounds) == [0, 2, 4]
    while control.evals.rounds.get(0):
        act(control)
    assert control.evals.oldest_version == 2


def test_an_interim_evaluation_that_cannot_be_had_is_given_up(tmp_path: Path) -> None:
    control = make(tmp_path, eval__every=1)
    control.stepped(report(0, metrics=False), {})
    control.stepped(report(1), {})
    for attempt in range(MAX_FRUITLESS_LEASES):
        held = lease(control, f"node {attempt}")
        assert held.kind == "eval"
        submit(control, Submission(lease=held.id, node_id="", episodes=()), f"node {attempt}")
    assert not control.evals.rounds and control.failure is None
    assert lease(control).kind == "train"


def test_the_last_evaluation_is_not_given_up_in_silence(tmp_path: Path) -> None:
    control = make(tmp_path, eval__after=True, run__steps=1)
    control.stepped(report(0, metrics=False), {})
    control.stepped(report(1, checkpointed=True), {})
    for attempt in range(MAX_FRUITLESS_LEASES):
        held = lease(control, f"node {attempt}")
        episodes = tuple(void(held, i, f"node {attempt}") for i in range(len(held.tasks)))
        submit(control, Submission(lease=held.id, node_id="", episodes=episodes), f"node {attempt}")
    assert control.failure is not None and "the machine was on fire" in control.failure.problem


# The learner, the end, and restarts


def feed(control: Control, groups: int, *nodes: str) -> None:
    for number in range(groups):
        act(control, nodes[number % len(nodes)])


def finish_step(control: Control, version: int, *, checkpointed: bool = False) -> tuple[Episode, ...]:
    """The learner takes the batch of `version` and reports the next one."""
    found = control.batch(version, 0.0).episodes
    assert found is not None
    control.stepped(report(version + 1), {})
    if checkpointed:
        control.stepped(report(version + 1, published=False, metrics=False, checkpointed=True), {})
    return found


@pytest.mark.parametrize("after", [False, True])
def test_the_run_is_over_when_all_is_done_and_saved(tmp_path: Path, after: bool) -> None:
    control = make(tmp_path, run__steps=2, eval__after=after)
    control.stepped(report(0, metrics=False), {})
    for version in range(2):
        feed(control, 3, "ann", "bob")
        finish_step(control, version)
    assert not control.ended, "the model is not saved yet"
    assert control.batch(2, 0.0).episodes is None and not control.batch(2, 0.0).ended
    assert (lease(control).kind == "eval") if after else (control.lease("ann", 64, 0.0).lease is None)
    control.stepped(report(2, published=False, metrics=False, checkpointed=True), {})
    if after:
        assert not control.ended
        control.node_left("ann", "test")
        act(control)
    assert control.ended and control.batch(2, 0.0).ended and control.lease("bob", 64, 0.0).ended
    summary = summarise(control.config, control, seconds=1.0)
    assert summary["worker_rollouts"] == {"ann": 16, "bob": 8, "local-0": 0, "local-1": 0}
    assert summary["min_worker_share"] == 0, "a worker of the run that supplied nothing counts"
    assert ("accuracy_after" in summary) == after


def test_the_learner_gets_the_same_batch_as_often_as_it_asks(tmp_path: Path) -> None:
    control = make(tmp_path)
    control.stepped(report(0, metrics=False), {})
    feed(control, 3, "ann")
    first = finish_step(control, 0)
    feed(control, 3, "bob")
    second = finish_step(control, 1)
    # It was killed, and begins again with its checkpoint of version 0; version 2 is still what workers hold.
    control.stepped(report(2, metrics=False), {})
    assert (control.batch(0, 0.0).episodes, control.batch(1, 0.0).episodes) == (first, second)
    control.stepped(report(1, published=False), {})
    control.stepped(report(2, published=False), {})
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2], "each step is logged once"
    assert (lines[0]["rollouts/ann"], lines[1]["rollouts/bob"]) == (12, 12)
    assert control.consumption.by_name == {"ann": 12, "bob": 12}, "and counted once"
    assert control.published == 2 and control.version == 2


def test_the_announcement_of_a_restarted_learner_is_no_step(tmp_path: Path) -> None:
    control = make(tmp_path, run__steps=2)
    control.stepped(report(2, metrics=False), {})
    assert control.version == 0 and control.published == 2 and not control.steps_done
    assert not control.batch(0, 0.0).ended


def test_batches_are_kept_for_every_checkpoint_that_is_kept(tmp_path: Path) -> None:
    control = make(tmp_path, run__steps=9, learner__keep_checkpoints=2)
    control.stepped(report(0, metrics=False), {})
    kept = []
    for version in range(6):
        feed(control, 3, "ann")
        finish_step(control, version, checkpointed=version % 2 == 1)
        kept.append(sorted(int(p.name) for p in (tmp_path / "runs/tiny/batches").iterdir()))
    assert kept == [[0], [0, 1], [0, 1, 2], [2, 3], [2, 3, 4], [4, 5]]
    assert control.batch(2, 0.0).ended, "asked for what is gone: said, and not made up"
    assert control.failure is not None and "batch of step 3 again" in control.failure.problem


def test_a_killed_coordinator_continues_where_it_was(tmp_path: Path) -> None:
    settings = {"run__steps": 4, "eval__after": True}
    control = make(tmp_path, **settings)
    control.name_of = {"ann": "attic", "bob": "barn"}.__getitem__
    control.stepped(report(0, metrics=False), {})
    feed(control, 3, "ann", "bob")
    first = finish_step(control, 0)
    feed(control, 2, "ann")
    running = lease(control, "bob")
    assert control.queue.running == {5}

    again = make(tmp_path, **settings)
    assert again.queue.pending == [5] and sorted(again.queue.buffered) == [3, 4]
    assert again.lost["interrupted"] == 1 and again.queue.counts["consumed"] == 3
    assert again.consumption.by_name == {"attic": 8, "barn": 4}, "names outlive the nodes' absence"
    again.stepped(report(1, metrics=False), {})
    assert again.batch(0, 0.0).episodes == first, "the learner's checkpoint is older than what it trained"
    assert submit(again, submission(running, "bob"), "bob") == {"late": 4}
    assert lease(again, "bob").group == "g5"
    again.node_left("bob", "test")
    for version in range(1, 4):
        feed(again, 3 - len(again.queue.buffered), "cid")
        finish_step(again, version, checkpointed=version == 3)
    act(again, "cid")
    assert again.ended
    assert again.queue.counts["consumed"] == 12 and again.book.is_conserved
    assert again.consumption.by_name.total() == 48


def test_staleness_is_remembered_across_restarts(tmp_path: Path) -> None:
    control = make(tmp_path, run__steps=5)
    control.stepped(report(0, metrics=False), {})
    feed(control, 9, "ann")
    for version in range(3):
        finish_step(control, version)
    assert control.consumption.max_staleness == 2
    again = make(tmp_path, run__steps=5)
    assert again.consumption.max_staleness == 2
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line[f"staleness/{line['step'] - 1}"] for line in lines] == [12, 12, 12]


def test_an_evaluation_that_a_kill_interrupted_is_done_after_all(tmp_path: Path) -> None:
    settings = {"eval__before": True, "eval__after": True, "run__steps": 3}
    control = make(tmp_path, **settings)
    control.stepped(report(0, metrics=False), {})
    control.stepped(report(1), {})
    manifests = tmp_path / "runs/tiny/snapshots/manifests/policy"
    manifests.mkdir(parents=True)
    for version in (0, 1):
        (manifests / f"{version:012d}").write_bytes(b"")
    again = make(tmp_path, **settings)
    again.stepped(report(1, metrics=False), {})
    assert sorted(again.evals.rounds) == [0]
    (manifests / f"{0:012d}").unlink()
    third = make(tmp_path, **settings)
    third.stepped(report(1, metrics=False), {})
    assert not third.evals.rounds, "its version is gone"


def test_whole_runs_with_restarts_and_losses(tmp_path: Path) -> None:
    """Random workers, kills of coordinator and learner: each step trains R whole groups, fresh, none of them twice."""
    for seed in range(6):
        _random_run(tmp_path / str(seed), random.Random(seed))


def _random_run(path: Path, rng: random.Random) -> None:
    changes = {"run__steps": 6, "learner__max_staleness": rng.randint(1, 3), "learner__checkpoint_every": 2}
    mode = rng.choice(["async", "pull"])
    control = make(path, learner__mode=mode, **changes)
    bound = control.config.learner.max_staleness
    trained: dict[int, tuple[Episode, ...]] = {}
    held: list[tuple[Lease, str]] = []
    version = checkpoint = 0
    control.stepped(report(0, metrics=False), {})
    now = 0.0
    for _ in range(5000):
        if control.ended:
            break
        now += rng.uniform(0, 0.4)
        what = rng.random()
        node = rng.choice(["ann", "bob"])
        if what < 0.4 and (found := control.lease(node, rng.choice([2, 64]), now).lease) is not None:
            held.append((found, node))
        elif what < 0.7 and held:
            one, holder = held.pop(rng.randrange(len(held)))
            version_now = one.min_version if one.exact_version else rng.randint(one.min_version, control.published)
            submit(control, submission(one, holder, version=version_now), holder, now)
        elif what < 0.75:
            control.node_left(node, "died")
            held = [(one, holder) for one, holder in held if holder != node]
        elif what < 0.97:
            episodes = control.batch(version, 0.0).episodes
            if episodes is not None:
                assert trained.setdefault(version, episodes) == episodes, "the same batch, always"
                version += 1
                control.stepped(report(version), {})
                if version % 2 == 0:
                    checkpoint = version
                    control.stepped(report(version, published=False, metrics=False, checkpointed=True), {})
        elif what < 0.985:
            version = checkpoint  # the learner was killed
        else:
            published = control.published
            control = make(path, learner__mode=mode, **changes)  # everything was
            control.stepped(report(published, metrics=False), {})
            version = checkpoint
        control.tick(now)
        assert control.book.is_conserved
    assert control.ended and sorted(trained) == list(range(6))
    groups = [e.group for batch in trained.values() for e in batch if e.index == 0]
    assert len(groups) == len(set(groups)) == 18, "nothing is trained twice"
    for step, batch in trained.items():
        assert Counter(Counter(e.group for e in batch).values()) == {4: 3}, "whole groups only"
        assert max(step - e.version for e in batch) <= bound
    lines = [json.loads(line) for line in (path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert control.consumption.by_name.total() == 72


def test_void_in_one_lease_of_an_evaluation_goes_back(tmp_path: Path) -> None:
    control = make(tmp_path, eval__before=True, eval__questions=6)
    control.stepped(report(0, metrics=False), {})
    held = lease(control)
    parts = tuple(episode(held, i, "ann") if i % 2 else void(held, i, "ann") for i in range(6))
    submit(control, Submission(lease=held.id, node_id="ann", episodes=parts))
    again = lease(control)
    assert again.tasks == held.tasks[::2]
