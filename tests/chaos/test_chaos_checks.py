"""Each check fails on a log in which something is wrong, and on no other."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

import _chaos_checks as checks
from _chaos_checks import Ended, Mark, Request
from shoal.broadcast.chain import Published, build_manifest, open_manifest, sign_manifest
from shoal.broadcast.tensors import view_of
from shoal.coordinator.audit import audit
from shoal.coordinator.journal import JOURNAL, Entry
from shoal.coordinator.rundir import RunDir
from shoal.fabric.identity import Identity

GOOD = Request(10.0, 10.5, "answered", 200, 3)


def judged(*requests: Request, **more: object) -> list[str]:
    given = {"deadline_s": 30.0, "stopped": [], "excused": []} | more
    return checks.bad_requests(requests, **given)  # type: ignore[arg-type]


def changed(**changes: object) -> Request:
    return msgspec.structs.replace(GOOD, **changes)


def test_requests_that_are_answered_or_refused_in_time_are_fine() -> None:
    assert judged(GOOD, changed(outcome="refused", status=429), changed(outcome="refused", status=503)) == []
    assert judged(changed(outcome="refused", status=400)) == []


@pytest.mark.parametrize("outcome", ["broken", "unreachable", "unanswered"])
def test_a_request_that_fails_is_excused_only_by_a_fault_of_the_server(outcome: str) -> None:
    (problem,) = judged(changed(outcome=outcome))
    assert outcome in problem
    assert judged(changed(outcome=outcome), excused=[(0.0, 9.0), (10.4, 11.0)]) == []
    assert len(judged(changed(outcome=outcome), excused=[(0.0, 9.0), (10.6, 11.0)])) == 1


def test_an_internal_error_is_a_failure() -> None:
    assert "500" in judged(changed(outcome="refused", status=500))[0]
    assert judged(changed(outcome="refused", status=500), excused=[(10.0, 10.1)]) == []


def test_a_request_that_hangs_is_excused_only_by_the_time_that_the_server_was_stopped() -> None:
    late = changed(ended_s=45.0)
    assert "took 35.0 s" in judged(late)[0]
    assert judged(late, stopped=[(12.0, 17.5)]) == []
    assert len(judged(late, stopped=[(12.0, 13.0)])) == 1
    assert len(judged(late, stopped=[(50.0, 60.0)])) == 1
    assert len(judged(late, excused=[(0.0, 60.0)])) == 1


def test_a_server_never_answers_by_an_older_version_in_the_same_life() -> None:
    later = changed(begun_s=20.0, ended_s=20.5, version=2)
    assert "after version 3" in checks.wrong_versions([GOOD, later], [0.0], newest=5)[0]
    assert checks.wrong_versions([GOOD, later], [0.0, 15.0], newest=5) == []
    assert checks.wrong_versions([GOOD, changed(begun_s=10.2, version=2)], [0.0], newest=5) == []


def test_a_version_that_was_never_published_is_found() -> None:
    assert "names version 3" in checks.wrong_versions([GOOD], [0.0], newest=2)[0]
    assert "names version -1" in checks.wrong_versions([changed(version=-1)], [0.0], newest=2)[0]
    assert checks.wrong_versions([GOOD], [0.0], newest=3) == []


def published(learner: Identity, version: int, parent: Published | None, run: str = "a run") -> Published:
    view = view_of("F32", (1,), bytes([version, 0, 0, 0]))
    manifest = build_manifest(run, "policy", version, parent.hash if parent else blake3(b"").digest(), {"w": view})
    return open_manifest(sign_manifest(manifest, learner), learner.public_key, run)


def test_a_chain_with_a_gap_a_missing_chunk_or_a_lost_version_is_found() -> None:
    learner = Identity.generate()
    first = published(learner, 1, None)
    second = published(learner, 2, first)
    third = published(learner, 3, second)
    assert checks.broken_chain([first, second, third], {1: 0, 2: 0, 3: 0}, {1, 2, 3}) == []
    assert "3 does not follow version 1" in checks.broken_chain([first, third], {}, {1, 3})[0]
    assert "version 2 lacks 4 chunks" in checks.broken_chain([first, second], {1: 0, 2: 4}, {2})[0]
    assert "newest that verifies is 2" in checks.broken_chain([first, second], {}, {3})[0]
    assert "newest that verifies is -1" in checks.broken_chain([], {}, {0})[0]
    assert checks.broken_chain([], {}, set()) == []


def journalled(folder: Path, *entries: tuple[str, tuple[int, ...]]) -> list[str]:
    run = RunDir.create(folder)
    run.write_atomic("config.toml", b"# a test's\n")
    for what, numbers in entries:
        run.append_record(JOURNAL, Entry(what=what, numbers=numbers))  # type: ignore[arg-type]
    run.close()
    return checks.broken_promises(audit(folder, max_staleness=2, acknowledged={"g0"}))


def test_an_acknowledged_group_that_is_nowhere_and_one_that_was_trained_twice_are_found(tmp_path: Path) -> None:
    assert journalled(tmp_path / "good", ("start", (0,)), ("accept", (0,)), ("batch", (0,))) == []
    lost = journalled(tmp_path / "lost", ("start", (0,)), ("lost", (0,)))
    assert "'lost': 1" in lost[0] and "acknowledged" in lost[1]
    twice = [("start", (0,)), ("accept", (0,)), ("batch", (0,)), ("batch", (0,))]
    assert "'duplicated': 1" in journalled(tmp_path / "twice", *twice)[0]


def test_a_run_that_does_not_go_on_is_found() -> None:
    marks = [Mark(1.0, "step"), Mark(5.0, "step"), Mark(6.0, "answer")]
    assert checks.stalled(marks, 4.0, {"step": 1, "answer": 1}) == []
    assert checks.stalled(marks, 4.0, {"step": 2}) == ["after the faults: 1 of 2 times 'step'"]
    assert checks.stalled(marks, 6.0, {"answer": 1, "step": 0}) == ["after the faults: 0 of 1 times 'answer'"]


def test_a_process_that_does_not_end_or_is_left_is_found() -> None:
    assert checks.endless([Ended("server", 2.0, 0), Ended("worker-0", 1.0, 130)], {}, 45.0) == []
    assert "server had not ended after 45 s" in checks.endless([Ended("server", 45.0, None)], {}, 45.0)[0]
    assert "46 s" in checks.endless([Ended("server", 46.0, 0)], {}, 45.0)[0]
    assert checks.endless([], {7: "shoal worker"}, 45.0) == ["process 7 is left: shoal worker"]


def test_a_scratch_folder_that_is_left_is_found() -> None:
    assert checks.leftovers([]) == []
    assert checks.leftovers(["server/a"]) == ["left on a disk: server/a"]


TRACE = """12:00:01 shoal.rollout group g1: 8 accepted
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    1 / 0
ZeroDivisionError: division by zero
and on it goes
"""


def test_a_traceback_is_a_defect() -> None:
    assert checks.crashes({"worker": "Error: the disk is full.\n"}) == []
    (problem,) = checks.crashes({"worker": TRACE})
    assert problem.startswith("worker has a traceback (ZeroDivisionError: division by zero)")
    assert len(checks.crashes({"worker": TRACE + TRACE, "server": TRACE})) == 3
    harmless = f"12:00:00 asyncio {checks.HARMLESS[0]}\n" + TRACE[TRACE.index(checks.TRACEBACK) :]
    assert checks.crashes({"server": harmless}) == []
    assert len(checks.crashes({"server": harmless + TRACE})) == 1
    assert "cut off" in checks.crashes({"worker": checks.TRACEBACK})[0]


def test_recovery_is_the_first_mark_of_its_kind_afterwards() -> None:
    marks = [Mark(9.0, "step"), Mark(4.0, "step"), Mark(5.0, "answer"), Mark(1.0, "step")]
    assert checks.recovery_s(marks, "step", 2.0) == 2.0
    assert checks.recovery_s(marks, "answer", 5.0) is None
