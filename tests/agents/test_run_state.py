"""The fold: a slow reference for readiness, and events that cannot follow."""

from __future__ import annotations

import msgspec
import pytest
from agent_cases import call
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.scheduler.records import RunEvent, RunRequest
from shoal.agents.scheduler.state import RunState
from shoal.errors import RecordError


class Story:
    """Feeds events with the right numbers, and keeps them."""

    def __init__(self) -> None:
        self.state = RunState()
        self.events: list[RunEvent] = []
        self.tell("run", request=msgspec.to_builtins(RunRequest(task="t")))

    def tell(self, kind: str, **data: object) -> None:
        event = msgspec.convert(
            {"run": "r", "seq": len(self.events) + 1, "time": float(len(self.events)), "kind": kind, "data": data},
            RunEvent,
        )
        self.state.apply(event)
        self.events.append(event)

    def plan(self, graph: list[set[int]], background: frozenset[int] = frozenset()) -> None:
        self.tell("thought", step=1, seen=self.state.seq, text="", tokens_in=1, tokens_out=1, usd=0.0)
        calls = [call(str(n), "add", *map(str, sorted(needs))) for n, needs in enumerate(graph)]
        plan = [{"call": msgspec.to_builtins(c), "background": n in background} for n, c in enumerate(calls)]
        self.tell("plan", step=1, calls=plan, answer=None)

    def result(self, name: str, ok: bool) -> None:
        error = {"kind": "error", "message": "no", "retryable": False}
        self.tell("result", call=name, ok=ok, seconds=0.1, **({"value": 1} if ok else {"error": error}))


graphs = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, max(0, k - 1)), max_size=3 if k else 0) for k in range(n)))
)


@given(graphs, st.randoms(use_true_random=False), st.integers(0, 100))
def test_a_call_is_ready_when_and_only_when_all_it_needs_has_succeeded(graph, random, failing) -> None:  # type: ignore[no-untyped-def]
    story = Story()
    story.plan(list(graph))
    done: dict[str, bool] = {}
    running: list[str] = []
    while True:
        expected_doomed = {
            str(n)
            for n, needs in enumerate(graph)
            if str(n) not in done and str(n) not in running and any(done.get(str(one)) is False for one in needs)
        }
        doomed = {state.call.id for state, _ in story.state.take_doomed()}
        assert doomed == expected_doomed
        for name in doomed:
            story.result(name, False)
            done[name] = False
        if doomed:
            continue
        expected = {
            str(n)
            for n, needs in enumerate(graph)
            if str(n) not in done and str(n) not in running and all(done.get(str(one)) for one in needs)
        }
        ready = [state.call.id for state in story.state.take_ready()]
        assert set(ready) == expected and len(ready) == len(expected)
        for name in ready:
            story.tell("dispatch", call=name, tool="add", arguments={})
            running.append(name)
        if not running:
            break
        name = running.pop(random.randrange(len(running)))
        story.result(name, random.randrange(100) >= failing)
        done[name] = story.events[-1].data["ok"]
    assert len(done) == len(graph) and story.state.open == 0
    assert story.state.wants_decision
    again = RunState()
    for event in story.events:
        again.apply(event)
    assert {n: (c.phase, c.outcome) for n, c in again.calls.items()} == {
        n: (c.phase, c.outcome) for n, c in story.state.calls.items()
    }


def test_calls_in_the_background_do_not_keep_the_model_waiting_and_are_news_when_they_end() -> None:
    story = Story()
    assert story.state.wants_decision
    story.plan([set(), set()], background=frozenset({1}))
    assert not story.state.wants_decision
    story.result("0", True)
    assert story.state.wants_decision
    story.tell("thought", step=2, seen=story.state.seq, text="", tokens_in=0, tokens_out=0, usd=0.0)
    story.tell("plan", step=2, calls=[], answer=None)
    assert not story.state.wants_decision
    story.result("1", True)
    assert story.state.wants_decision


def test_a_result_that_came_while_the_model_thought_is_news_to_it() -> None:
    story = Story()
    story.plan([set(), set()], background=frozenset({0, 1}))
    seen = story.state.seq
    story.result("0", True)
    story.tell("thought", step=2, seen=seen, text="", tokens_in=0, tokens_out=0, usd=0.0)
    story.tell("plan", step=2, calls=[], answer=None)
    assert story.state.wants_decision


def test_what_cannot_follow_is_refused() -> None:
    story = Story()
    story.plan([set()])
    story.result("0", True)
    with pytest.raises(RecordError, match="has its result"):
        story.result("0", True)
    story = Story()
    with pytest.raises(RecordError, match="cannot follow"):
        story.state.apply(RunEvent(run="r", seq=5, time=0.0, kind="resumed", data={}))
    story.tell("final", answer="3")
    with pytest.raises(RecordError, match="cannot follow"):
        story.tell("resumed")


def test_the_time_a_run_lay_dead_is_not_spent() -> None:
    state = RunState()
    request = {"request": msgspec.to_builtins(RunRequest(task="t"))}
    state.apply(RunEvent(run="r", seq=1, time=100.0, kind="run", data=request))
    state.apply(RunEvent(run="r", seq=2, time=103.0, kind="queued", data={}))
    state.apply(RunEvent(run="r", seq=3, time=9000.0, kind="resumed", data={}))
    state.apply(RunEvent(run="r", seq=4, time=9001.0, kind="queued", data={}))
    assert state.seconds == 4.0
