"""The log, resuming after a kill -9, forks, and followers."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from agent_cases import House, add, answer, call, of_kind, plan, results, tool, turns, wait

from shoal.agents.http import frame
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Decision, RunEvent, RunRequest
from shoal.agents.tools.card import Use
from shoal.errors import RunError, StorageError


def event(seq: int, run: str = "r", **data: object) -> RunEvent:
    return RunEvent(run=run, seq=seq, time=1.5, kind="progress", data=data)


def test_what_was_appended_is_there_and_cannot_be_changed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.db")
    written = [event(n, text="\u2713 \0" * n) for n in range(1, 1200)]
    log.append(written[:1])
    log.append(written[1:])
    assert list(log.events("r")) == written
    assert [one.seq for one in log.events("r", until=3)] == [1, 2, 3]
    with pytest.raises(StorageError):
        log.append([event(1200), event(7)])
    assert len(list(log.events("r"))) == 1199, "all or none"
    stranger = sqlite3.connect(log.path, isolation_level=None)
    for statement in ("UPDATE events SET seq=0", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            stranger.execute(statement)
    with pytest.raises(RunError, match="no run"):
        list(log.events("s"))
    log.close()


def test_a_file_that_is_no_log_and_a_gap_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database at all, but long enough to be read as one" * 50)
    with pytest.raises(StorageError, match="cannot be used"):
        EventLog(tmp_path / "text")
    log = EventLog(tmp_path / "log.db")
    log.append([event(1), event(3)])
    with pytest.raises(StorageError, match="event 2 of run r is missing"):
        list(log.events("r"))


def test_one_process_at_a_time_works_on_a_run(tmp_path: Path) -> None:
    log, other = EventLog(tmp_path / "log.db"), EventLog(tmp_path / "log.db")
    with log.claim("r"):
        with pytest.raises(RunError, match="being worked on"), other.claim("r"):
            pass
        with other.claim("s"):
            pass
    with other.claim("r"):
        pass


async def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    def script(view: View) -> Decision:
        if not view.steps:
            return plan(call("a", "add", x=1, y=2), call("w", "wait", seconds=0.3), call("b", "add", "w", x=3, y=4))
        return answer(str([view.value(name) for name in view.calls]))

    policy = ScriptedPolicy(script)
    async with House(tmp_path, [tool(add), tool(wait)], policy) as house:
        name = house.runs.start(RunRequest(task="t"))
        async for one in house.runs.follow(name):
            if one.kind == "result":
                break
    async with House(tmp_path, [tool(add), tool(wait)], policy) as house:
        assert house.runs.summary(name)["status"] == "interrupted"
        house.runs.resume(name)
        await house.runs.ended(name)
        events = list(house.log.events(name))
        house.runs.resume(name)
        await house.runs.ended(name)
        assert list(house.log.events(name)) == events, "a run that has ended is left as it is"
    assert events[-1].data["answer"] == "[3, 'waited 0.3', 7]"
    assert results(events)["a"] == 3
    assert len(of_kind(events, "plan")) == 2, "one for the calls and one for the answer"
    assert [one["call"] for one in of_kind(events, "started")] == ["a", "w", "w", "b"]


async def test_a_call_that_may_have_acted_is_not_repeated_on_resuming(tmp_path: Path) -> None:
    tools = [tool(wait, Use())]
    policy = turns(plan(call("w", "wait", seconds=5)), answer("ok"))
    async with House(tmp_path, tools, policy) as house:
        name = house.runs.start(RunRequest(task="t"))
        async for one in house.runs.follow(name):
            if one.kind == "started":
                break
    async with House(tmp_path, tools, policy) as house:
        house.runs.resume(name)
        await house.runs.ended(name)
        events = list(house.log.events(name))
    assert results(events) == {"w": "!interrupted"} and len(of_kind(events, "started")) == 1


CHILD = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from agent_cases import TRUSTED, House, answer, call, plan, tool
from shoal.agents.scheduler.policy import ScriptedPolicy
from shoal.agents.scheduler.records import RunRequest

folder = Path(sys.argv[1])

async def mark(n: int) -> int:
    "Leaves a mark for every time it is really called."
    await asyncio.sleep(0.02 * (n % 4))
    with (folder / "marks").open("a") as file:
        file.write(f"{n}\\n")
    return n

def script(view):
    if not view.steps:
        return plan(*(call(f"n{n}", "mark", *([f"n{n - 3}"] if n > 2 else []), n=n) for n in range(40)))
    return answer(str(sum(view.value(name) for name in view.calls)))

async def main():
    async with House(folder, [tool(mark)], ScriptedPolicy(script)) as house:
        if len(sys.argv) > 3:
            name = sys.argv[3]
            house.runs.resume(name)
        else:
            name = house.runs.start(RunRequest(task="t"))
            print(name, flush=True)
        print((await house.runs.ended(name)).data["answer"], flush=True)

asyncio.run(main())
"""


async def test_after_kill_9_no_completed_call_is_repeated(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    async def child(*arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path),
            here,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )

    process = await child()
    assert process.stdout is not None
    name = (await process.stdout.readline()).decode().strip()
    log = EventLog(tmp_path / "runs.db")
    deaths = 0
    while True:
        before = len([one for one in log.events(name) if one.kind == "result"])
        async with asyncio.timeout(30):
            while len([one for one in log.events(name) if one.kind == "result"]) < before + 10:
                if process.returncode is not None:
                    break
                await asyncio.sleep(0.01)
        if process.returncode is not None or deaths == 3:
            break
        process.send_signal(signal.SIGKILL)
        await process.wait()
        deaths += 1
        process = await child(name)
    async with asyncio.timeout(30):
        await process.wait()
    events = list(log.events(name))
    assert deaths == 3 and len(of_kind(events, "resumed")) == 3
    assert events[-1].data == {"answer": str(sum(range(40)))}
    assert results(events) == {f"n{n}": n for n in range(40)}
    finished: set[str] = set()
    for one in events:
        if one.kind == "started":
            assert one.data["call"] not in finished
        if one.kind == "result":
            finished.add(one.data["call"])
    marks = (tmp_path / "marks").read_text().split()
    starts = [one["call"] for one in of_kind(events, "started")]
    assert set(marks) == {str(n) for n in range(40)}
    assert all(marks.count(str(n)) <= starts.count(f"n{n}") for n in range(40))


async def test_a_fork_shares_its_beginning_and_goes_its_own_way(tmp_path: Path) -> None:
    answers = iter(["first", "second"])

    def script(view: View) -> Decision:
        return answer(next(answers)) if view.steps else plan(call("a", "add", x=1, y=2))

    async with House(tmp_path, [tool(add)], ScriptedPolicy(script)) as house:
        events = await house.run()
        at = next(one.seq for one in events if one.kind == "result")
        name = house.runs.fork(events[0].run, at)
        await house.runs.ended(name)
        forked = list(house.log.events(name))
        for wrong in (0, len(events), 99):
            with pytest.raises(RunError):
                house.runs.fork(events[0].run, wrong)
    assert events[-1].data["answer"] == "first" and forked[-1].data["answer"] == "second"
    assert [one.data for one in forked[1:at]] == [one.data for one in events[1:at]]
    assert forked[0].data["forked"] == events[at - 1].id
    assert len(of_kind(forked, "started")) == 1, "the call was made before the fork"


async def test_a_follower_that_is_cut_off_anywhere_reads_the_same_bytes(tmp_path: Path) -> None:
    policy = turns(plan(*(call(f"a{n}", "add", x=n, y=1) for n in range(6))), answer("ok"))
    async with House(tmp_path, [tool(add)], policy) as house:
        name = house.runs.start(RunRequest(task="t"))
        whole = [one async for one in house.runs.follow(name)]
        for cut in range(len(whole) + 1):
            parts = whole[:cut]
            async with aclosing(house.runs.follow(name, cut)) as rest:
                parts = parts + [one async for one in rest]
            assert b"".join(map(frame, parts)) == b"".join(map(frame, whole))
        with pytest.raises(RunError):
            async for _ in house.runs.follow("nothing"):
                pass
