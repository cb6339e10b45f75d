"""What a run keeps of its calls: few in memory, all of them known, each readable."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_cases import House, add, answer, call, plan, results, tool, turns
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.scheduler import calls as calls_module
from shoal.agents.scheduler.calls import Calls, CallState
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Budget, Decision
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.outcome import Success


@given(st.lists(st.integers(0, 30), unique=True), st.integers(0, 8))
def test_all_ids_stay_known_and_no_more_than_so_many_finished_calls_are_held(ended: list[int], most: int) -> None:
    asked: list[tuple[str, int, int]] = []

    def recall(name: str, planned: int, end: int) -> CallState:
        asked.append((name, planned, end))
        return CallState(call(name, "add"), 1, False, planned, ended_seq=end)

    table = Calls(recall, most)
    for number in range(31):
        table.add(CallState(call(f"c{number}", "add"), 1, False, planned_seq=number))
    for order, number in enumerate(ended, start=100):
        table[f"c{number}"].ended_seq = order
        table.finished(f"c{number}")
    assert len(table) == 31 and {*table} == {f"c{number}" for number in range(31)}
    assert len(table.held()) == 31 - max(0, len(ended) - most)
    assert all(f"c{number}" in table.held() for number in range(31) if number not in ended), "open calls are held"
    for order, number in enumerate(ended, start=100):
        assert table[f"c{number}"].ended_seq == order and table[f"c{number}"].planned_seq == number
    assert "c99" not in table
    with pytest.raises(KeyError):
        table["c99"]


async def test_a_call_of_long_ago_can_be_referred_to_and_its_id_is_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module.Calls.__init__, "__defaults__", (None, 10))
    seen: list[tuple[int, int]] = []

    def script(view: View) -> Decision:
        seen.append((len(view.calls), len(view.calls.held())))  # type: ignore[attr-defined]
        if len(view.steps) < 5:
            return plan(*(call(f"n{len(view.steps)}_{n}", "add", x=n, y=1) for n in range(20)))
        if len(view.steps) == 5:
            assert view.value("n0_3") == 4
            return plan(call("n0_0", "add", x={"$result": "n0_7"}, y={"$result": "n4_19"}))
        return answer(str(view.value(view.steps[-1].calls[0])))

    async with House(tmp_path, [tool(add)], ScriptedPolicy(script)) as house:
        events = await house.run()
        whole = RunState()
        for event in events:
            whole.apply(event)
        again = house.runs.state(events[0].run)
        for name, state in whole.calls.items():
            other = again.calls[name]
            assert other.outcome == state.outcome and other.call == state.call and other.step == state.step
    assert events[-1].data == {"answer": "28"}
    assert [held for _, held in seen] == [0, 10, 10, 10, 10, 10, 10] and seen[-1][0] == 101
    assert "n0_0" not in whole.steps[-2].calls, "the id was taken"


async def test_what_a_run_keeps_does_not_grow_with_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in objects, which no garbage and no other test blurs."""
    monkeypatch.setattr(calls_module.Calls.__init__, "__defaults__", (None, 100))
    held: list[int] = []

    def script(view: View) -> Decision:
        calls = view.calls.held()  # type: ignore[attr-defined]
        held.append(sum(len(str(state.outcome)) + len(str(state.call)) for state in calls.values()))
        if len(view.steps) == 8:
            return answer("done")
        return plan(*(call("", "add", x=n, y=10**6) for n in range(200)))

    async with House(tmp_path, [tool(add)], ScriptedPolicy(script)) as house:
        events = await house.run(budget=Budget(calls=2000))
    assert len(results(events)) == 1600
    assert max(held) < 1.2 * held[1], held


async def test_a_finished_calls_arguments_are_let_go(tmp_path: Path) -> None:
    policy = turns(plan(call("a", "add", x=1, y=2)), answer("ok"))
    async with House(tmp_path, [tool(add)], policy) as house:
        events = await house.run()
        state = house.runs.state(events[0].run).calls["a"]
    assert state.outcome == Success(value=3) and state.arguments == {} and state.call.arguments == {"x": 1, "y": 2}
