"""Nodes in processes of their own: the coordinator and every roster miss whoever dies or stops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from served import Served

PATIENCE_S = 100.0
"""The longest that any one thing may take on a busy machine."""

pytestmark = pytest.mark.timeout(300)

Spawn = Callable[[Served, str], subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a node that joins; whatever is left at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Served, name: str) -> subprocess.Popen[str]:
        import shoal

        env = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
        script = str(Path(__file__).with_name("joined_peer.py"))
        command = [sys.executable, script, run.ticket().encode(), name]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def node_id_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        line = await asyncio.to_thread(process.stdout.readline)
    assert line, "the node ended"
    return line.strip()


async def until(condition: Callable[[], object]) -> float:
    """Wait for it; gives the seconds that it took."""
    started = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.01)
    return time.monotonic() - started


async def test_who_dies_or_stops_is_missed_and_loses_its_leases(
    tmp_path: Path, spawn: Spawn, record_property: Callable[[str, object], None]
) -> None:
    async with Served(tmp_path) as run:
        observer = await run.join("observer")
        first, second = spawn(run, "first"), spawn(run, "second")
        killed, stopped = await node_id_of(first), await node_id_of(second)

        def is_here(node_id: str) -> bool:
            working = node_id in {node.node_id for node in run.coordinator.workers()}
            views = [run.coordinator.member, observer.member]
            return working and all(node_id in {node.id for node in view.nodes()} for view in views)

        def is_gone(node_id: str) -> bool:
            working = node_id in {node.node_id for node in run.coordinator.workers()}
            views = [run.coordinator.member, observer.member]
            return not working and not any(node_id in {node.id for node in view.nodes()} for view in views)

        def held(node_id: str) -> int:
            return sum(holding.node_id == node_id for holding in run.control.book.running.values())

        await until(lambda: is_here(killed) and is_here(stopped))
        assert held(killed) == held(stopped) == 1
        first.kill()
        record_property("detect_kill_s", await until(lambda: is_gone(killed)))
        assert held(killed) == 0 and is_here(stopped)

        # As silent as a cut cable: its sockets stay open, and nothing comes.
        second.send_signal(signal.SIGSTOP)
        record_property("detect_stop_s", await until(lambda: is_gone(stopped)))
        assert held(stopped) == 0
        assert {e.data["reason"] for e in run.events("lease.void")} == {"died"}

        second.send_signal(signal.SIGCONT)
        await until(lambda: is_here(stopped))
