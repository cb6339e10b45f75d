"""The queue's history on disk, so that a killed coordinator continues where it was.

Written in this order, each before the next is visible: an accepted group's episodes (`buffer/N`), then its line in
the journal; a batch's episodes (`batches/VERSION`), then its line, then the group files go. The learner is a
deterministic consumer of batches: when it restarts from an older checkpoint it is given the same batches again.

Invariants: replaying the journal gives the queue as it was, with what was running put back to pending; a group is in
at most one batch; a batch, once formed, never changes.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterable
from typing import Literal

from msgspec.structs import replace

from shoal.coordinator.rundir import RunDir
from shoal.envs.base import stable_int
from shoal.errors import RecordError, StorageError
from shoal.planning.queue import GroupQueue
from shoal.protocol.codec import Record, decode, encode, read_jsonl
from shoal.protocol.episode import Episode

JOURNAL = "journal.jsonl"


class Entry(Record, frozen=True):
    """One line: what happened to which groups."""

    what: Literal["start", "lost", "accept", "batch", "sweep"]
    numbers: tuple[int, ...]
    version: int = 0
    """accept: version of the oldest token; batch: the step that consumes it."""


class EpisodeFile(Record, frozen=True):
    """Episodes kept on disk as one MessagePack file."""

    episodes: tuple[Episode, ...]

    def check(self) -> None:
        for episode in self.episodes:
            episode.check()


class Journal:
    """Writes and replays one run's history."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self.num_batches = 0
        """Batches formed so far: those of steps 0 to `num_batches` - 1."""

    def note(self, what: Literal["start", "lost", "accept", "batch", "sweep"], *numbers: int, version: int = 0) -> None:
        """Append one line."""
        self._run.append_record(JOURNAL, Entry(what=what, numbers=numbers, version=version))

    def accept(self, number: int, version: int, episodes: Iterable[Episode]) -> None:
        """Keep an accepted group."""
        self._run.write_atomic(f"buffer/{number:06d}", encode(EpisodeFile(episodes=tuple(episodes))))
        self.note("accept", number, version=version)

    def form_batch(self, step: int, numbers: list[int], *, shuffle_seed: int | None = None) -> tuple[Episode, ...]:
        """Make the batch of `step` from accepted groups; gives its episodes.

        Args:
            shuffle_seed: permute the rewards over all episodes: the control that must not learn.
        """
        episodes = [e for n in numbers for e in self._read(f"buffer/{n:06d}")]
        if shuffle_seed is not None:
            rewards = [episode.reward for episode in episodes]
            random.Random(stable_int("shuffle", shuffle_seed, step)).shuffle(rewards)
            episodes = [replace(e, reward=r) for e, r in zip(episodes, rewards, strict=True)]
        self._run.write_atomic(f"batches/{step:06d}", encode(EpisodeFile(episodes=tuple(episodes))))
        self.note("batch", *numbers, version=step)
        self.num_batches = max(self.num_batches, step + 1)
        for number in numbers:
            (self._run.path / f"buffer/{number:06d}").unlink(missing_ok=True)
        return tuple(episodes)

    def sweep(self, numbers: list[int]) -> None:
        """Forget groups that went stale."""
        if numbers:
            self.note("sweep", *numbers)
        for number in numbers:
            (self._run.path / f"buffer/{number:06d}").unlink(missing_ok=True)

    def batch(self, step: int) -> tuple[Episode, ...] | None:
        """The batch of `step`, if it was formed and is still kept."""
        if not (self._run.path / f"batches/{step:06d}").exists():
            return None
        return self._read(f"batches/{step:06d}")

    def forget_batches(self, below: int) -> None:
        """Drop batches that no checkpoint can ask for any more."""
        for path in (self._run.path / "batches").iterdir():
            if path.name.isdigit() and int(path.name) < below:
                path.unlink(missing_ok=True)

    def replay(self, queue: GroupQueue) -> int:
        """Bring a fresh queue to the journal's end; gives the number of rollout groups that were running.

        Files without their line (the kill came between) are removed: what they held will be made again.
        """
        self._run.cut_half_line(JOURNAL)
        path = self._run.path / JOURNAL
        batches: set[int] = set()
        for entry in read_jsonl(path, Entry) if path.exists() else ():
            for number in entry.numbers:
                self._apply(queue, entry, number)
            if entry.what == "batch":
                batches.add(entry.version)
        self.num_batches = max(batches, default=-1) + 1
        self._keep_only("batches", batches)
        self._keep_only("buffer", queue.buffered)
        was_running = len(queue.running)
        for number in sorted(queue.running):
            queue.lost(number)
            self.note("lost", number)
        return was_running

    def _keep_only(self, folder: str, numbers: Container[int]) -> None:
        for file in (self._run.path / folder).iterdir():
            if not file.name.isdigit() or int(file.name) not in numbers:
                file.unlink()

    @staticmethod
    def _apply(queue: GroupQueue, entry: Entry, number: int) -> None:
        """One line's effect on one group; a line that cannot follow those before it is damage, and is named."""
        drawn = number < queue.next_number
        match entry.what:
            case "start" if number in queue.pending or not drawn:
                if drawn:
                    queue.pending.remove(number)
                queue.running.add(number)
                queue.next_number = max(queue.next_number, number + 1)
            case "lost" if number in queue.running:
                queue.lost(number)
            case "accept" if number in queue.running:
                queue.finish(number, entry.version)
            case "batch" | "sweep" if number in queue.buffered:
                del queue.buffered[number]
                queue.counts["consumed" if entry.what == "batch" else "swept"] += 1
            case _:
                raise RecordError(
                    f"the run's journal is damaged: it says '{entry.what}' of group {number}, which cannot be.",
                    "Start a new run.",
                )

    def _read(self, name: str) -> tuple[Episode, ...]:
        try:
            data = (self._run.path / name).read_bytes()
        except OSError as error:
            raise StorageError(
                f"{self._run.path / name} cannot be read: {error.strerror}.", "The run cannot go on without it."
            ) from None
        return decode(data, EpisodeFile, max_bytes=2**32).episodes
