"""A coordinator that comes back before its learner does: who may go on meanwhile, and under what."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

from made import config, new_control, report, submission

from served import Served
from shoal.broadcast.chain import build_manifest, sign_manifest
from shoal.broadcast.store import Store
from shoal.coordinator.control import Control
from shoal.planning.staleness import may_start
from shoal.protocol.codec import encode
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease

R, S = 3, 2
"""Groups a step and staleness bound of the tiny configuration."""


def make(path: Path, **changes: object) -> Control:
    changes = {"eval__before": False, "eval__after": False, "run__steps": 9, **changes}
    return new_control(config(path, **changes), path / "runs" / "tiny")


def ask(control: Control, version: int, node: str = "ann", now: float = 0.0) -> Lease | None:
    """What the service does with a worker's question."""
    control.provisioning.holds(node, version, now)
    return control.lease(node, 64, now).lease


def work(control: Control, held: Lease, node: str = "ann", version: int | None = None) -> dict[str, str]:
    return asyncio.run(control.submit(submission(held, node, version=version), node, 0.0))


def train_to(control: Control, version: int) -> None:
    """So many steps, each published at once."""
    control.stepped(report(0, metrics=False), {})
    for step in range(version):
        while control.batch(step, 0.0).episodes is None:
            held = ask(control, step)
            assert held is not None
            work(control, held)
        control.stepped(report(step + 1), {})


def test_workers_go_on_under_what_they_hold(tmp_path: Path) -> None:
    control = make(tmp_path)
    train_to(control, 3)
    running = ask(control, 3)
    assert running is not None
    again = make(tmp_path)
    again.resumed(3)
    assert ask(again, 0, "new") is None, "who holds nothing would wait for a learner that is not there"
    assert "the learner is starting" in again.why_idle("new", 0.0)[1]
    assert ask(again, 4, "liar") is None, "nobody has published what it claims to hold"
    held = ask(again, 3)
    assert held is not None and held.min_version == 3
    assert held.group == running.group and held.seeds == running.seeds, "lost work comes first, and is the same work"
    assert again.lease("ann", 64, 0.0).newest_version == 0, "nobody is told to fetch what nobody gives out"
    assert set(work(again, held).values()) == {"accepted"}
    again.stepped(report(3, metrics=False), {})
    assert ask(again, 0, "new") is not None
    assert again.lease("ann", 64, 0.0).newest_version == 3


def test_an_older_version_is_gone_on_with_only_where_admission_opens_under_it(tmp_path: Path) -> None:
    """With nothing buffered the next group is consumed at step 6: not too late for version 4, too late for 3."""
    control = make(tmp_path)
    train_to(control, 6)
    running = ask(control, 6)
    assert running is not None and control.queue.counts["swept"] == 0
    control = make(tmp_path)
    control.resumed(6)
    assert control.queue.ahead == 6 * R and control.queue.pending
    assert ask(control, 3) is None, "not even work that was lost: version 6 it was admitted for"
    taken = [ask(control, 4, f"w{n}") for n in range(R)]
    assert [one.min_version for one in taken if one is not None] == [4] * R
    assert ask(control, 4, "late") is None, "one more would be consumed at step 7"
    newer = ask(control, 5, "late")
    assert newer is not None and newer.min_version == 5
    for number, one in enumerate(taken):
        assert one is not None
        work(control, one, f"w{number}")
    control.stepped(report(6, metrics=False), {})
    batch = control.batch(6, 0.0).episodes
    assert batch is not None and max(6 - e.version for e in batch) == S and control.queue.counts["swept"] == 0


def test_tokens_of_what_was_never_published_are_refused(tmp_path: Path) -> None:
    control = make(tmp_path)
    train_to(control, 2)
    control = make(tmp_path)
    control.resumed(2)
    held = ask(control, 2)
    assert held is not None
    assert set(work(control, held, version=3).values()) == {"rejected"}


def test_a_new_run_waits_for_its_first_version(tmp_path: Path) -> None:
    control = make(tmp_path)
    assert ask(control, 0) is None and ask(control, 7) is None


def test_histories_with_long_absences_of_the_learner(tmp_path: Path) -> None:
    """Restarts at random, after which the learner takes its time: whole groups, none twice, none staler than S."""
    alone = sum(_history(tmp_path / str(seed), random.Random(seed)) for seed in range(5))
    assert alone > 15, "nobody ever went on alone: these histories show nothing"


def _history(tmp_path: Path, rng: random.Random) -> int:
    """Gives how many groups were started without a learner."""
    mode, steps, now = rng.choice(["async", "async", "pull"]), 8, 0.0
    settings = {"learner__mode": mode, "run__steps": steps, "learner__checkpoint_every": 2}
    control = make(tmp_path, **settings)
    bound = control.config.learner.max_staleness
    version = checkpoint = published = alone = 0
    is_absent = False
    trained: dict[int, tuple[Episode, ...]] = {}
    running: list[tuple[Lease, str]] = []
    holds = Counter[str]()
    control.stepped(report(0, metrics=False), {})
    for _ in range(6000):
        if control.ended:
            break
        now += rng.uniform(0.0, 0.4)
        what, node = rng.random(), rng.choice(["ann", "bob", "cid"])
        if what < 0.4:
            if not is_absent:
                holds[node] = rng.randint(holds[node], published)
            ahead = control.queue.ahead
            if (found := ask(control, holds[node], node, now)) is not None:
                running.append((found, node))
                if is_absent:
                    alone += 1
                    assert 0 < found.min_version == holds[node] <= published
                    assert may_start(ahead, found.min_version, bound, R)
        elif what < 0.7 and running:
            one, holder = running.pop(rng.randrange(len(running)))
            newest = max(one.min_version, holds[holder])
            drawn = one.min_version if one.exact_version else rng.randint(one.min_version, newest)
            asyncio.run(control.submit(submission(one, holder, version=drawn), holder, now))
        elif what < 0.74:
            control.node_left(node, "died")
            running = [(one, holder) for one, holder in running if holder != node]
        elif what < 0.96 and not is_absent:
            if (episodes := control.batch(version, now).episodes) is not None:
                assert trained.setdefault(version, episodes) == episodes, "the same batch, always"
                version += 1
                published = max(published, version)
                control.stepped(report(version), {})
                if version % 2 == 0:
                    checkpoint = version
                    control.stepped(report(version, published=False, metrics=False, checkpointed=True), {})
        elif what > 0.97 and not is_absent:
            control, version, is_absent = make(tmp_path, **settings), checkpoint, True
            control.resumed(published)
        elif what > 0.98 and is_absent:
            is_absent = False
            control.stepped(report(published, metrics=False), {})
        control.tick(now)
        assert control.book.is_conserved
    assert control.ended and sorted(trained) == list(range(steps))
    groups = [e.group for batch in trained.values() for e in batch if e.index == 0]
    assert len(groups) == len(set(groups)) == steps * R, "nothing is trained twice"
    for step, batch in trained.items():
        assert set(Counter(e.group for e in batch).values()) == {4}, "whole groups only"
        assert max(step - e.version for e in batch) <= bound
    return alone


async def test_the_coordinator_finds_the_newest_version_on_its_chain(tmp_path: Path) -> None:
    """Signed by the run's learner: what anybody else put there counts for nothing."""
    async with Served(tmp_path) as run:
        workers = {version: await run.join(name=f"holds {version}") for version in (0, 1, 2, 7)}
        store = Store(run.run.path / "snapshots", run=run.run.name, trusted_key=run.learner.public_key)
        for version in (1, 2):
            store.put_manifest(sign_manifest(build_manifest(run.run.name, "policy", version, b"", {}), run.learner))
        forged = sign_manifest(build_manifest(run.run.name, "policy", 7, b"", {}), run.root)
        (run.run.path / f"snapshots/manifests/policy/{7:012d}").write_bytes(encode(forged))
        await run.restart(learner=False)
        assert run.control.published == -1
        found = {version: (await part.link.lease(version, 8)).lease for version, part in workers.items()}
        under = {version: None if lease is None else lease.min_version for version, lease in found.items()}
        assert under == {0: None, 1: 1, 2: 2, 7: None}
