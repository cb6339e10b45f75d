"""Programs started for one episode each: what they are told, how they end, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from shoal.errors import ShoalError, TaskError
from shoal.rollout.nursery import Ended, Nursery

Make = Callable[..., Nursery]

ENVIRONMENT = {"PATH": os.environ["PATH"], "COLOUR": "blue"}


@pytest.fixture(params=["executed", "forked"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """A nursery of one script, in both ways to start it."""
    async with AsyncExitStack() as stack:

        def made(source: str) -> Nursery:
            script = tmp_path / "agent.py"
            script.write_text(source)
            preload = ("json", "decimal") if request.param == "forked" else ()
            nursery = Nursery([sys.executable, str(script), "first"], preload=preload, folder=str(tmp_path))
            stack.push_async_callback(nursery.close)
            return nursery

        yield made


async def run(nursery: Nursery, task: str = "{}", deadline_s: float = 60.0, output_bytes: int = 4096) -> Ended:
    return await nursery.run(ENVIRONMENT, task, deadline_s=deadline_s, output_bytes=output_bytes)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(pids: list[int]) -> None:
    async with asyncio.timeout(20):
        while any(map(is_alive, pids)):  # noqa: ASYNC110  Processes do not tell us of their end.
            await asyncio.sleep(0.02)


async def test_a_program_gets_its_task_and_gives_its_result(make: Make, tmp_path: Path) -> None:
    nursery = make(
        "import os, sys\n"
        "known = os.environ['COLOUR'], 'SHOAL_HOME' in os.environ\n"
        "print(sys.stdin.read(), sys.argv[1], *known, os.getcwd(), __name__)\n"
        "print('a complaint', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    ended = await run(nursery, '{"question": "ü"}')
    assert ended.stdout.split() == ['{"question":', '"ü"}', "first", "blue", "False", str(tmp_path), "__main__"]
    assert (ended.exit_code, ended.why, ended.complaint) == (3, "", "a complaint")


async def test_programs_run_side_by_side_and_apart(make: Make) -> None:
    nursery = make("import sys, time, decimal\ntime.sleep(0.3)\nprint(sys.stdin.read())\ndecimal.spoilt = True\n")
    ended = await asyncio.gather(*(run(nursery, str(number)) for number in range(12)))
    assert [one.stdout.strip() for one in ended] == [str(number) for number in range(12)]


async def test_an_exception_is_an_exit_code_and_a_complaint(make: Make) -> None:
    ended = await run(make("raise ValueError('a banana')"))
    assert ended.exit_code == 1 and ended.complaint == "ValueError: a banana"


async def test_what_takes_too_long_or_says_too_much_is_killed(make: Make) -> None:
    ended = await run(make("import time\nprint('begun', flush=True)\ntime.sleep(600)"), deadline_s=1.0)
    assert ended.why == "deadline" and ended.stdout == "begun\n" and ended.exit_code < 0
    ended = await run(make("while True: print('x' * 1000)"), output_bytes=5000)
    assert ended.why == "output" and len(ended.stdout) == 5000


HIDES = """
import os, subprocess, sys, time
plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
away = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), plain.pid, away.pid, flush=True)
time.sleep(%s)
os._exit(0)
"""


@pytest.mark.parametrize("seconds", [0, 600])
async def test_nothing_that_a_program_started_outlives_it(make: Make, seconds: int) -> None:
    """Neither its children nor those that left its session, whether it ends or is killed."""
    ended = await run(make(HIDES % seconds), deadline_s=2.0)
    assert ended.why == ("" if seconds == 0 else "deadline")
    await gone([int(word) for word in ended.stdout.split()])


async def test_the_end_of_the_nursery_and_of_whoever_waits_ends_programs(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    source = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"

    async def begun() -> int:
        async with asyncio.timeout(20):
            while not (note.exists() and note.read_text()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        pid = int(note.read_text())
        note.unlink()
        return pid

    nursery = make(source)
    waiting = asyncio.create_task(run(nursery))
    pid = await begun()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await gone([pid])
    waiting = asyncio.create_task(run(nursery))
    pid = await begun()
    await nursery.close()
    assert not is_alive(pid)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_nursery_that_was_killed_fails_those_who_wait_and_is_started_again(make: Make) -> None:
    nursery = make("import sys, time\ntask = sys.stdin.read()\ntime.sleep(600 if task == 'slow' else 0)\nprint(task)")
    waiting = asyncio.create_task(run(nursery, "slow"))
    assert (await run(nursery, "quick")).stdout == "quick\n"
    process = nursery._process
    assert process is not None
    process.kill()
    started = time.monotonic()
    with pytest.raises(ShoalError, match="has died"):
        await waiting
    assert time.monotonic() - started < 30
    assert (await run(nursery, "again")).stdout == "again\n"


async def test_what_cannot_be_started_is_said() -> None:
    nursery = Nursery(["python-that-is-not-there", "x.py"], preload=["json"])
    with pytest.raises(TaskError, match="cannot be started"):
        await run(nursery)
    nursery = Nursery([sys.executable, "x.py"], preload=["no_such_module_anywhere"])
    with pytest.raises(TaskError, match="could not import no_such_module_anywhere"):
        await run(nursery)
    nursery = Nursery(["no-such-program"])
    ended = await run(nursery)
    assert ended.exit_code == 1 and "no-such-program" in ended.complaint
    await nursery.close()
