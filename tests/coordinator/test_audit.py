"""What an audit of a run's folder finds: each broken promise by its name, and nothing in a run that kept them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.coordinator.audit import audit
from shoal.coordinator.journal import JOURNAL, Entry
from shoal.errors import RunError
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion

Line = tuple[str, tuple[int, ...], int]

GOOD: tuple[Line, ...] = (
    ("start", (0,), 0),
    ("start", (1,), 0),
    ("lost", (1,), 0),
    ("start", (1,), 0),
    ("accept", (0,), 0),
    ("accept", (1,), 1),
    ("batch", (0,), 0),
    ("batch", (1,), 1),
    ("start", (2,), 0),
    ("accept", (2,), 1),
    ("start", (3,), 0),
    ("accept", (3,), 1),
    ("sweep", (3,), 0),
    ("start", (4,), 0),
)
"""Two steps of one group each; group 2 waits, 3 went stale, a worker acts on 4."""


def episode(group: int, version: int, index: int = 0) -> Episode:
    completion = Completion(token_ids=(5,), logprobs=(-1.0,), versions=(version,), finish="stop", text="x")
    return Episode(
        id=f"l{group}/{index}",
        group=f"g{group}",
        index=index,
        task=Task(env="digit", id="train-0", seed=0),
        turns=(Turn(context_ids=(1,), observation="?", completion=completion),),
        outcome="done",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that kept its promises."""
    for name in ("buffer", "episodes"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").write_text("")
    journal(tmp_path, GOOD)
    (tmp_path / "buffer" / "000002").write_bytes(b"kept")
    metrics(tmp_path, 1, 2)
    consumed(tmp_path, 0, episode(0, 0), episode(0, 0, 1))
    consumed(tmp_path, 1, episode(1, 1))
    return tmp_path


def journal(folder: Path, lines: tuple[Line, ...]) -> None:
    entries = [Entry(what=what, numbers=numbers, version=version) for what, numbers, version in lines]  # type: ignore[arg-type]
    (folder / JOURNAL).write_bytes(b"".join(to_json(entry) + b"\n" for entry in entries))


def metrics(folder: Path, *steps: int) -> None:
    lines = [json.dumps({"kind": "step", "step": step}) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def consumed(folder: Path, step: int, *episodes: Episode) -> None:
    (folder / "episodes" / f"{step:06d}.jsonl").write_bytes(b"".join(to_json(e) + b"\n" for e in episodes))


def test_a_run_that_kept_its_promises(folder: Path) -> None:
    found = audit(folder, max_staleness=2, acknowledged=("g0", "g1", "g2", "g3", "eval-7"))
    assert found.good and found.problems == []
    assert (found.steps, found.started, found.accepted, found.lost_leases) == (2, 6, 4, 1)
    assert (found.consumed, found.swept, found.buffered, found.running) == (2, 1, 1, 1)


def test_half_a_line_is_what_a_kill_leaves(folder: Path) -> None:
    for name in (JOURNAL, "metrics.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"what": "ba')
    assert audit(folder, max_staleness=2).good


def _lose_buffer(folder: Path) -> None:
    (folder / "buffer" / "000002").unlink()


def _lose_step(folder: Path) -> None:
    metrics(folder, 2)


def _lose_episodes(folder: Path) -> None:
    (folder / "episodes" / "000001.jsonl").unlink()


def _train_group_twice(folder: Path) -> None:
    journal(folder, (*GOOD, ("batch", (0,), 2)))


def _train_episode_twice(folder: Path) -> None:
    consumed(folder, 1, episode(1, 1), episode(0, 0))


def _count_step_twice(folder: Path) -> None:
    metrics(folder, 1, 2, 2)


def _train_stale(folder: Path) -> None:
    consumed(folder, 4, episode(2, 1))


def _train_unborn(folder: Path) -> None:
    consumed(folder, 1, episode(1, 2))


def _accept_unstarted(folder: Path) -> None:
    journal(folder, (*GOOD, ("accept", (9,), 0)))


def _train_unknown(folder: Path) -> None:
    consumed(folder, 1, episode(1, 1), episode(8, 1))


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_lose_buffer, "lost"),
        (_lose_step, "lost"),
        (_lose_episodes, "lost"),
        (_train_group_twice, "duplicated"),
        (_train_episode_twice, "duplicated"),
        (_count_step_twice, "duplicated"),
        (_train_stale, "staleness_violations"),
        (_train_unborn, "staleness_violations"),
        (_accept_unstarted, "disorder"),
        (_train_unknown, "disorder"),
    ],
)
def test_a_broken_promise_is_found(folder: Path, damage: Callable[[Path], None], kind: str) -> None:
    damage(folder)
    found = audit(folder, max_staleness=2)
    assert not found.good and getattr(found, kind) > 0 and found.problems


def test_what_a_worker_was_told_must_be_there(folder: Path) -> None:
    found = audit(folder, max_staleness=2, acknowledged=("g0", "g4", "g17"))
    assert found.lost == 2


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        audit(tmp_path / "nothing", max_staleness=1)
