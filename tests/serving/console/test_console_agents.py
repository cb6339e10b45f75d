"""Traces of agents' runs, folded from the scheduler's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from console_cases import agent_events, write_log
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.records import RunEvent
from shoal.serving.console.agents import AgentLog
from shoal.serving.console.traces import MAX_LANES, Trace

KINDS = (
    "run",
    "thought",
    "plan",
    "dispatch",
    "queued",
    "started",
    "progress",
    "retry",
    "result",
    "final",
    "error",
    "?",
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ("call", "calls", "answer", "request", "attempt", "ok", "error", "value", "text", "tokens_in", "id")
)


def test_a_run_becomes_lanes() -> None:
    trace = Trace("r")
    for one in agent_events("r"):
        trace.apply(one.seq, one.time, one.kind, one.data)
    assert (trace.num_calls, trace.num_done, trace.num_failed, trace.num_retries) == (2, 2, 1, 1)
    assert (trace.tokens, round(trace.usd, 2)) == (17, 0.51)
    first, second = trace.lanes["c1"], trace.lanes["c2"]
    assert first.ok
    assert [(a.started, a.ended) for a in first.attempts] == [(1005.0, 1006.0), (1007.0, 1008.0)]
    assert "timeout" in first.attempts[0].error
    assert second.after == ("c1",)
    assert second.outcome.startswith("error: ")
    assert (trace.steps[0].calls, trace.steps[1].answer) == (["c1", "c2"], "3 ")
    assert (trace.end, trace.running, trace.num_at_once) == ("final", 0, 1)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(NAMES, JSON, max_size=5)), max_size=12))
def test_whatever_an_event_says_nothing_breaks(events: list[tuple[str, dict[str, Any]]]) -> None:
    trace = Trace("r")
    plan = {"calls": [{"call": {"id": "c1", "tool": "t", "arguments": {}, "after": []}}]}
    for seq, (kind, data) in enumerate([("thought", {}), ("plan", plan), *events], start=1):
        trace.apply(seq, float(seq), kind, {"call": "c1", **data})
    assert trace.running >= 0


def test_a_huge_run_is_cut_and_counted() -> None:
    trace = Trace("r")
    calls = [{"call": {"id": f"c{n}", "tool": "t", "arguments": {}, "after": []}} for n in range(MAX_LANES + 5)]
    trace.apply(1, 1.0, "thought", {})
    trace.apply(2, 1.0, "plan", {"calls": calls})
    for n in range(MAX_LANES + 5):
        trace.apply(3 + n, 2.0, "result", {"call": f"c{n}", "ok": True})
    assert len(trace.lanes) == MAX_LANES
    assert trace.num_calls == trace.num_done == MAX_LANES + 5


def test_a_log_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    watched = AgentLog(path)
    assert not watched.read()
    events = agent_events("one")
    write_log(path, events[:6])
    assert watched.read()
    assert [(run.id, run.state) for run in watched.runs] == [("one", "open")]
    trace = watched.trace("one")
    assert trace is not None
    assert trace.seq == 6
    assert watched.trace("two") is None
    log = EventLog(path)
    log.append(events[6:])
    log.append([RunEvent(run="two", seq=1, time=2000.0, kind="run", data={"request": {"task": "another"}})])
    assert watched.read()
    assert trace.end == "final"
    assert [(run.id, run.state) for run in watched.runs] == [("two", "open"), ("one", "final")]
    assert not watched.read()
    watched.close()
    log.close()


def test_a_file_that_is_no_log_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(b"nonsense " * 1000)
    watched = AgentLog(path)
    assert watched.read()
    assert "cannot be used" in watched.problem
