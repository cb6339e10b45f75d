"""A run on disk: whatever is killed when, replaying the journal gives the queue that was; no group trains twice."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import plain_episode

from shoal.coordinator.journal import JOURNAL, Entry, Journal
from shoal.coordinator.rundir import RunDir
from shoal.errors import RecordError, RunError, StorageError
from shoal.planning.queue import GroupQueue
from shoal.protocol.codec import from_json
from shoal.protocol.episode import Episode

GROUP_SIZE = 2


class Killed(Exception):
    """The process ends here."""


class MortalRunDir(RunDir):
    """Dies at the n-th write: before it, in the middle of it, or after it."""

    writes_left = 10**9
    how = "before"

    def _die_or(self, *, half: bool) -> bool:
        """Whether to write before dying; raises where not even that happens."""
        self.writes_left -= 1
        if self.writes_left > 0:
            return False
        if self.how == "before" or (self.how == "half" and not half):
            raise Killed
        return True

    def write_atomic(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        dying = self._die_or(half=False)
        super().write_atomic(name, data, mode=mode)
        if dying:
            raise Killed

    def append(self, name: str, line: bytes) -> None:
        dying = self._die_or(half=True)
        if dying and self.how == "half":
            with (self.path / name).open("ab") as file:
                file.write((line + b"\n")[: random.Random(len(line)).randrange(1, len(line) + 1)])
            raise Killed
        super().append(name, line)
        if dying:
            raise Killed


class Life:
    """A coordinator's use of queue and journal, from one start to one kill."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.run = MortalRunDir(path)
        self.rng = rng
        self.queue = GroupQueue(groups_per_step=2, max_staleness=1, window=4)
        self.journal = Journal(self.run)
        self.journal.replay(self.queue)
        self.run.writes_left = rng.randint(1, 40)
        self.run.how = rng.choice(["before", "half", "after"])
        self.step = self.journal.num_batches
        self.before = copy.deepcopy(self.queue)
        """The queue before what is being done now."""
        self.handed_out: dict[int, tuple[Episode, ...]] = {}

    def live(self) -> None:
        """Do things until killed."""
        while True:
            self.before = copy.deepcopy(self.queue)
            self.rng.choice([self.start, self.start, self.finish, self.finish, self.lose, self.take])()

    def start(self) -> None:
        number = self.queue.start(self.step, 10**6)
        if number is not None:
            self.journal.note("start", number)

    def finish(self) -> None:
        if self.queue.running:
            number = self.rng.choice(sorted(self.queue.running))
            version = max(0, self.step - self.rng.randint(0, 2))
            self.journal.accept(number, version, [plain_episode(number, i, version=version) for i in range(GROUP_SIZE)])
            self.queue.finish(number, version)

    def lose(self) -> None:
        if self.queue.running:
            number = self.rng.choice(sorted(self.queue.running))
            self.queue.lost(number)
            self.journal.note("lost", number)

    def take(self) -> None:
        numbers, swept = self.queue.take(self.step)
        self.journal.sweep(swept)
        if numbers is not None:
            self.handed_out[self.step] = self.journal.form_batch(self.step, numbers)
            self.step += 1


def interrupted(queue: GroupQueue) -> GroupQueue:
    """The queue as a restart makes it: what was running waits to be leased again."""
    queue = copy.deepcopy(queue)
    for number in list(queue.running):
        queue.lost(number)
    return queue


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_a_history_of_kills(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    kill_again_and_again(tmp_path_factory, seed)


@pytest.mark.slow
@settings(max_examples=400)
@given(seed=st.integers(0, 2**32))
def test_many_histories_of_kills(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    kill_again_and_again(tmp_path_factory, seed)


def kill_again_and_again(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Live, be killed in some write, be started again; the disk must always tell a queue that really was."""
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("run")
    RunDir.create(path)
    handed_out: dict[int, tuple[Episode, ...]] = {}
    for _ in range(6):
        life = Life(path, rng)
        with pytest.raises(Killed):
            life.live()
        again = RunDir(path)
        queue = GroupQueue(groups_per_step=2, max_staleness=1, window=4)
        journal = Journal(again)
        journal.replay(queue)
        assert _facts(queue) in [_facts(q) for q in _possible(life)]
        handed_out |= life.handed_out
        for step, episodes in handed_out.items():
            assert journal.batch(step) == episodes, "a batch that was handed out never changes"
        _check_files(path, queue, journal)


def _possible(life: Life) -> list[GroupQueue]:
    found = [interrupted(life.before), interrupted(life.queue)]
    # The last act may have been a sweep whose batch was not written, or an acceptance that memory does not know yet.
    for number in life.before.running - life.queue.running or life.before.running:
        for version in (max(0, life.step - age) for age in range(3)):
            accepted = copy.deepcopy(life.before)
            accepted.finish(number, version)
            found.append(interrupted(accepted))
    without_batch = copy.deepcopy(life.before)
    stale = [n for n, v in life.before.buffered.items() if life.step - v > life.before.max_staleness]
    for number in stale:
        del without_batch.buffered[number]
    without_batch.counts["swept"] += len(stale)
    found.append(interrupted(without_batch))
    return found


def _facts(queue: GroupQueue) -> tuple[object, ...]:
    return (
        queue.next_number,
        queue.pending,
        sorted(queue.running),
        dict(sorted(queue.buffered.items())),
        {k: n for k, n in sorted(queue.counts.items()) if n},
    )


def _check_files(path: Path, queue: GroupQueue, journal: Journal) -> None:
    journal_path = path / JOURNAL
    lines = journal_path.read_bytes().splitlines(keepends=True) if journal_path.exists() else []
    assert all(line.endswith(b"\n") for line in lines)
    entries = [from_json(line, Entry) for line in lines]
    batches = [(e.version, e.numbers) for e in entries if e.what == "batch"]
    assert [version for version, _ in batches] == list(range(journal.num_batches)), "each step has one batch"
    consumed = [number for _, numbers in batches for number in numbers]
    assert len(consumed) == len(set(consumed)), "no group is in two batches"
    assert not set(consumed) & {n for e in entries if e.what == "sweep" for n in e.numbers}
    for version, numbers in batches:
        episodes = journal.batch(version)
        assert episodes is not None
        assert Counter(e.group for e in episodes) == {f"g{n}": GROUP_SIZE for n in numbers}, "groups are whole"
    assert {int(p.name) for p in (path / "buffer").iterdir()} == set(queue.buffered)
    assert {int(p.name) for p in (path / "batches").iterdir()} == {version for version, _ in batches}


def test_half_a_line_is_cut_off_for_good(tmp_path: Path) -> None:
    """Also where what was written is a whole record that only lacks its newline."""
    run = RunDir.create(tmp_path / "run")
    journal = Journal(run)
    for what in ("start", "lost"):
        journal.note(what, 0)  # type: ignore[arg-type]
    run.close()
    path = run.path / JOURNAL
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(3):
        queue = GroupQueue(1, 1, 2)
        again = RunDir(run.path)
        Journal(again).replay(queue)
        assert queue.pending == [0] and not queue.running
        again.close()


def test_a_journal_that_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    for index, history in enumerate(
        [("accept",), ("lost",), ("start", "start"), ("start", "batch"), ("start", "accept", "accept"), ("sweep",)]
    ):
        run = RunDir.create(tmp_path / str(index))
        for what in history:
            Journal(run).note(what, 3)  # type: ignore[arg-type]
        with pytest.raises(RecordError, match=f"says '{history[-1]}' of group 3"):
            Journal(run).replay(GroupQueue(1, 1, 2))


def test_a_lost_file_ends_in_words(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    journal = Journal(run)
    journal.note("start", 0)
    journal.accept(0, 0, [plain_episode(0, 0)])
    (run.path / "buffer/000000").unlink()
    with pytest.raises(StorageError, match="buffer/000000 cannot be read"):
        journal.form_batch(0, [0])


def test_old_batches_are_forgotten(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    journal = Journal(run)
    for step in range(4):
        journal.note("start", step)
        journal.accept(step, 0, [plain_episode(step, 0)])
        journal.form_batch(step, [step])
    journal.forget_batches(2)
    assert [journal.batch(step) is None for step in range(4)] == [True, True, False, False]


REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=8, max_size=8)


@settings(max_examples=25)
@given(rewards=REWARDS, seed=st.integers(0, 5))
def test_shuffled_rewards_are_a_permutation_and_the_same_each_time(
    tmp_path_factory: pytest.TempPathFactory, rewards: list[float], seed: int
) -> None:
    def batch(step: int, shuffle: int | None) -> tuple[Episode, ...]:
        run = RunDir.create(tmp_path_factory.mktemp("runs") / "run")
        journal = Journal(run)
        for number in range(4):
            journal.note("start", number)
            journal.accept(number, 0, [plain_episode(number, i, reward=rewards[2 * number + i]) for i in range(2)])
        return journal.form_batch(step, [0, 1, 2, 3], shuffle_seed=shuffle)

    plain, shuffled = batch(1, None), batch(1, seed)
    assert [e.reward for e in plain] == rewards
    assert Counter(e.reward for e in shuffled) == Counter(rewards)
    assert [e.id for e in shuffled] == [e.id for e in plain], "only the rewards move"
    assert shuffled == batch(1, seed)


def test_shuffles_differ_from_step_to_step(tmp_path: Path) -> None:
    orders = []
    for step in range(3):
        run = RunDir.create(tmp_path / str(step))
        journal = Journal(run)
        journal.note("start", 0)
        journal.accept(0, 0, [plain_episode(0, i, reward=float(i)) for i in range(32)])
        orders.append([e.reward for e in journal.form_batch(step, [0], shuffle_seed=7)])
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)


def test_one_process_runs_a_run(tmp_path: Path) -> None:
    first, second = RunDir.create(tmp_path / "run"), RunDir(tmp_path / "run")
    first.lock()
    with pytest.raises(RunError, match="going on in another process"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "new")
    run.discard_unstarted()
    assert not run.path.exists()
    begun = RunDir.create(tmp_path / "begun")
    begun.event("run.started")
    begun.discard_unstarted()
    assert begun.path.exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    RunDir.create(mine).discard_unstarted()
    assert (mine / "thesis.txt").exists(), "a folder that was there before is never removed"


@pytest.mark.parametrize("tail", [b"", b"x", b'{"half', b"z" * 200_000])
def test_a_half_line_of_any_length_is_cut(tmp_path: Path, tail: bytes) -> None:
    run = RunDir.create(tmp_path / "run")
    whole = b'{"a":1}\n' * 3
    (run.path / "file").write_bytes(whole + tail)
    run.append("file", b"next")
    assert (run.path / "file").read_bytes() == whole + b"next\n"
    (run.path / "other").write_bytes(tail)
    run.append("other", b"next")
    assert (run.path / "other").read_bytes() == b"next\n"
