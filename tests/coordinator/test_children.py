"""Child processes: ended in order, killed where they do not listen, their output kept and bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.coordinator import processes
from shoal.coordinator.processes import PARENT_VARIABLE, Children

POLITE = "#!/bin/sh\necho polite $$; exec sleep 100\n"
DEAF = "#!/bin/sh\ntrap '' TERM; echo deaf; while true; do sleep 0.1; done\n"
BRIEF = "#!/bin/sh\necho first; echo last; exit 3\n"


def program(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes `text` what children run in the place of Python."""
    file = path / f"program-{abs(hash(text))}"
    file.write_text(text)
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


async def test_all_have_ended_when_end_all_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(tmp_path)
    for name, text in (("polite", POLITE), ("deaf", DEAF), ("brief", BRIEF)):
        program(tmp_path, monkeypatch, text)
        child = await children.start(name, [])
        while not child.tail:
            await processes.asyncio.sleep(0.02)
    await children.end_all(grace_s=0.5)
    codes = {child.name: child.process.returncode for child in children.all}
    assert codes == {"polite": -15, "deaf": -9, "brief": 3}
    assert all(not Path(f"/proc/{child.process.pid}").exists() for child in children.all), "none is left unreaped"


async def test_a_child_has_a_session_of_its_own_and_knows_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "#!/bin/sh\necho $SHOAL_PARENT_PID $EXTRA; ps -o sid= -p $$\n")
    children = Children(tmp_path)
    child = await children.start("one", ["a", "b"], {"EXTRA": "more"})
    assert await child.process.wait() == 0
    told, session = child.log.read_text().splitlines()
    assert told == f"{os.getpid()} more" and int(session) == child.process.pid, "Ctrl-C does not reach it"


async def test_the_tail_is_the_end_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(tmp_path)
    program(tmp_path, monkeypatch, BRIEF)
    child = await children.start("one", [])
    await child.process.wait()
    assert child.tail.splitlines() == ["first", "last"]
    with child.log.open("ab") as log:
        log.write(b"\xff" * 100_000 + b"\nthe end\n")
    assert child.tail.endswith("\nthe end") and len(child.tail) <= processes.LOG_TAIL_BYTES


async def test_a_log_that_has_grown_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    program(tmp_path, monkeypatch, BRIEF)
    children = Children(tmp_path)
    for _ in range(3):
        child = await children.start("one", [])
        await child.process.wait()
    assert child.log.read_text() == (tmp_path / "one.log.1").read_text() == "first\nlast\n"


def test_a_child_of_a_dead_parent_ends_at_once() -> None:
    """The parent may die before the child has asked to die with it."""
    code = "from shoal.coordinator.processes import die_with_parent; die_with_parent(); print('alive')"
    for parent, alive in ((str(os.getpid()), True), ("1" if os.getpid() != 1 else "2", False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, PARENT_VARIABLE: parent},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout == "alive\n") == alive, done


def test_what_a_child_starts_is_not_taken_for_a_child() -> None:
    code = (
        "import os, subprocess, sys; from shoal.coordinator.processes import die_with_parent as d; d();"
        "subprocess.run([sys.executable, '-c', 'from shoal.coordinator.processes import die_with_parent as d; d();"
        'print("alive")\'])'
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "alive\n", done
