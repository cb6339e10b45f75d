"""What is told of nodes that keep others waiting, and that what is well is not named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.coordinator.silence import (
    LOST_TOLD_S,
    SILENT_AFTER_S,
    STARTING_TOLD_S,
    notices,
    state_of,
    stopped_process,
)
from shoal.protocol.status import LeaseState, NodeStatus, NodeView, Wait

IDLE = ("idle", "between two leases")


def said(*waits: Wait, doing: str = "") -> NodeStatus:
    return NodeStatus(
        node_id="a" * 16,
        name="local-0",
        role="worker",
        software="1",
        protocol_version=1,
        pid=1,
        host="here",
        now=0.0,
        up_s=1.0,
        doing=doing,
        waits=waits,
    )


def view(state: str, silent_s: float = 6.0, **facts: Any) -> NodeView:
    return NodeView(node_id="a" * 16, name="local-0", role="worker", state=state, silent_s=silent_s, **facts)  # type: ignore[arg-type]


def told(*nodes: NodeView, own: tuple[Wait, ...] = (), process: Callable[[NodeView], str] = lambda _: "") -> list[str]:
    return [notice.text for notice in notices(nodes, own, {"b" * 16: "learner"}, process)]


def lease(number: int, left_s: float) -> LeaseState:
    return LeaseState(id=f"g{number}.0123abcd", rollouts=8, tokens=5, left_s=left_s)


def test_a_silent_worker_is_named_with_what_it_holds() -> None:
    one = view("silent", leases=(lease(12, 24.0),), num_leases=1)
    assert told(one) == ["local-0 silent for 6 s, holds lease g12 (8 rollouts), expires in 24 s"]
    two = view("silent", leases=(lease(12, 24.0), lease(13, 9.0)), num_leases=2, status=said(doing="samples"))
    assert told(two) == [
        "local-0 silent for 6 s, holds 2 leases (16 rollouts), the first expires in 9 s, said last that it samples"
    ]


def test_a_lost_node_is_named_for_a_while() -> None:
    assert told(view("lost")) == ["local-0 silent for 6 s, its connection is lost; what it held is leased again"]
    assert told(view("lost", LOST_TOLD_S + 1)) == []


def test_a_wait_that_takes_too_long_is_named_with_whom_and_until_when() -> None:
    chunk = Wait(what="chunk 3 of version 7", whom="b" * 16, seconds=6.0, deadline_s=30.0, overdue=True)
    usual = Wait(what="a verdict", whom="b" * 16, seconds=1.0)
    assert told(view("active", 0.0, status=said(chunk, usual))) == [
        "local-0 waits for chunk 3 of version 7 from learner, 6 s, deadline 30 s"
    ]
    assert told(view("silent", status=said(chunk))) == ["local-0 silent for 6 s"], "what it said last is old"
    assert told(own=(chunk,)) == ["coordinator waits for chunk 3 of version 7 from learner, 6 s, deadline 30 s"]


def test_a_stopped_process_is_named_at_once() -> None:
    for state, ending in (("active", ""), ("starting", " was started 1 s ago and has not joined yet")):
        assert told(view(state, 1.0), process=lambda _: "process 5 is stopped") == [
            f"local-0{ending}: process 5 is stopped"
        ]
    assert told(view("starting", 1.0)) == []
    assert told(view("starting", STARTING_TOLD_S + 1)) != []


@given(
    silent_s=st.floats(0, 1e6),
    connected=st.booleans(),
    has_work=st.booleans(),
)
def test_who_is_well_is_not_named(silent_s: float, connected: bool, has_work: bool) -> None:
    state, why = state_of(silent_s=silent_s, connected=connected, has_work=has_work, idle=IDLE)
    well = connected and silent_s <= SILENT_AFTER_S
    assert (state in ("active", "idle")) == well
    assert bool(why) == (state != "active")
    named = told(view(state, silent_s))
    assert (named == []) == (well or (state == "lost" and silent_s >= LOST_TOLD_S))


def test_a_subject_stays_the_same_while_its_seconds_go_on() -> None:
    for state in ("silent", "lost"):
        early, late = (notices([view(state, s)], (), {}, lambda _: "")[0] for s in (6.0, 9.0))
        assert early.subject == late.subject and early.text != late.text


def test_a_process_that_was_stopped_is_told_from_one_that_runs() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert stopped_process(process.pid) == ""
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while not stopped_process(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"`kill -CONT {process.pid}`" in stopped_process(process.pid)
        os.kill(process.pid, signal.SIGCONT)
        while stopped_process(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopped_process(process.pid) == ""
    finally:
        process.kill()
        process.wait()
    assert stopped_process(process.pid) == ""
