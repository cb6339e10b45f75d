"""What is asked of coordinators and servers: silence is said, whatever comes back is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_console_views import status_of

from shoal.errors import NetworkError, RecordError, RunError
from shoal.protocol.status import RunStatus
from shoal.serving.console import asked
from shoal.serving.console.asked import Ask, Coordinator, samples


async def test_a_coordinator_that_comes_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "ASK_S", 0.0)
    script = [RunError("it is not running."), "status", "status", NetworkError("it is silent."), "status"]
    seen: list[tuple[str, bool]] = []
    enough = asyncio.Event()

    def following() -> object:
        if not script:
            enough.set()
            return "status"
        return script.pop(0)

    async def ask() -> RunStatus:
        found = following()
        if isinstance(found, Exception):
            raise found
        return status_of("attic")

    @asynccontextmanager
    async def reach() -> AsyncIterator[Ask]:
        if script and isinstance(script[0], RunError):
            raise script.pop(0)
        yield ask

    watched = Coordinator(reach)
    task = asyncio.create_task(
        watched.follow(lambda: True, lambda: seen.append((watched.problem, watched.status is not None)))
    )
    await enough.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert seen[:5] == [("it is not running.", False), ("", True), ("", True), ("it is silent.", True), ("", True)]
    assert watched.status is not None, "what it said last is kept"


async def test_nobody_is_asked_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "ASK_S", 0.0)

    @asynccontextmanager
    async def reach() -> AsyncIterator[Ask]:
        raise AssertionError("nobody looks")
        yield

    task = asyncio.create_task(Coordinator(reach).follow(lambda: False, lambda: None))
    await asyncio.sleep(0.02)
    assert not task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_a_page_of_metrics_says(page: bytes) -> None:
    try:
        found = samples(page)
    except RecordError:
        return
    assert all(isinstance(value, float) for value in found.values())


def test_a_page_of_metrics() -> None:
    page = b'# TYPE a counter\na_total 3.0\nb{x="1"} 2.0\n# TYPE c gauge\nc NaN\nd 4\n'
    assert samples(page) == {"a_total": 3.0, "d": 4.0}
