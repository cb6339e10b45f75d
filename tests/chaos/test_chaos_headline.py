"""What a benchmark of many runs says of them: counts, and the times of what recovered undisturbed."""

from __future__ import annotations

from typing import Any

from _chaos_checks import Mark
from _chaos_faults import COLD_START_S, Injected, excused, recoveries, stopped
from _chaos_script import Fault
from chaos import headline_of


def killed(kind: str, target: str, at_s: float, **more: Any) -> Injected:
    return Injected(Fault(kind, (target,), at_s, 1.0), at_s, at_s + 1, restarted_s=at_s + 1, **more)


def test_recovery_counts_from_the_new_start_and_says_whether_it_was_alone() -> None:
    marks = [Mark(13.0, "step"), Mark(14.0, "worker-1")]
    learner, worker = killed("kill_learner", "learner", 10.0), killed("kill_worker", "worker-1", 40.0)
    assert recoveries([learner, worker], marks) == [
        {"part": "learner", "took_s": 2.0, "alone": True},
        {"part": "worker", "took_s": None, "alone": True},
    ]
    near = killed("kill_server", "server", 12.0)
    assert recoveries([learner, near], [*marks, Mark(15.0, "answer")])[0]["alone"] is False


def test_a_router_is_back_when_everybody_found_it_and_what_was_not_there_was_not_struck() -> None:
    back = killed("restart_router", "router-0", 10.0, back_s=14.0)
    gone = killed("restart_router", "router-1", 90.0)
    missed = killed("kill_server", "server", 10.0, struck=False)
    assert [row["took_s"] for row in recoveries([back, gone, missed], [])] == [3.0, None]


def test_only_faults_of_the_server_excuse_it() -> None:
    other = Injected(Fault("disk_full", ("home",), 1.0, 2.0), 1.0, 3.0)
    own = Injected(Fault("disk_full", ("server",), 1.0, 2.0), 1.0, 3.0)
    assert excused([other], [], []) == [] and stopped([other]) == []
    ((begun_s, ended_s),) = excused([own], [], [])
    assert begun_s == 1.0 and ended_s > 3.0
    assert excused([], [5.0], [4.0]) == [(5.0, 5.0 + COLD_START_S)]
    assert excused([], [5.0], [4.0, 30.0, 12.0]) == [(5.0, 12.0)]
    pause = Injected(Fault("pause", ("server",), 1.0, 2.0), 1.0, 3.0)
    assert stopped([pause]) == [(1.0, 3.0)] and excused([pause], [], []) == []


def test_the_headline_counts_violations_by_run() -> None:
    quick = {"part": "coordinator", "took_s": 2.0, "alone": True}
    rows = [
        {"seed": 0, "faults": [1], "struck": ["pause"], "violations": [], "recoveries": [quick], "goes_on_s": 3.0},
        {
            "seed": 1,
            "faults": [1, 2],
            "struck": ["pause", "loss"],
            "violations": ["end: a", "end: b"],
            "recoveries": [
                {"part": "coordinator", "took_s": 9.0, "alone": False},
                {"part": "worker", "took_s": None, "alone": True},
                {"part": "coordinator", "took_s": 4.0, "alone": True},
            ],
        },
    ]
    found = headline_of(rows)
    assert found["runs"] == 2 and found["fault_kinds"] == 2 and found["faults"] == 3
    assert found["violations"] == 2 and found["runs_with_violations"] == 1 and found["unrecovered"] == 1
    assert found["coordinator_resume_p50_s"] == 3.0 and found["coordinator_resume_max_s"] == 4.0
    assert "worker_recovery_p50_s" not in found
