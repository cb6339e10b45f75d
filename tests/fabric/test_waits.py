"""The register of waits: what is listed, what is a detail, and that it costs and holds little."""

from __future__ import annotations

import asyncio
import threading

import pytest

from shoal.errors import NetworkError
from shoal.fabric import waits
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.service import Request
from shoal.fabric.waits import in_words, open_waits, waiting


def mine(prefix: str = "test") -> list[str]:
    """What the open waits of this test wait for."""
    return [wait.what for wait in open_waits() if wait.what.startswith(prefix)]


def test_a_wait_is_listed_from_its_beginning_to_its_end_whatever_happens() -> None:
    def fail() -> None:
        with waiting("test of an error"):
            assert mine() == ["test of an error"]
            raise ValueError("why it ended")

    with pytest.raises(ValueError, match="why it ended"):
        fail()
    assert mine() == []


async def test_a_cancelled_wait_is_over() -> None:
    async def wait() -> None:
        with waiting("test of cancelling"):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert mine() == ["test of cancelling"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert mine() == []


def test_a_wait_that_outlives_its_task_counts_from_its_last_progress() -> None:
    wait = waiting("test of weights", usual_s=0.0).begin()
    try:
        with waiting("test of a chunk", is_detail=True) as chunk:
            assert not chunk.is_nested and sorted(mine()) == ["test of a chunk", "test of weights"]
        with wait.parts(), waiting("test of a chunk", is_detail=True) as chunk:
            assert chunk.is_nested
        begun = wait.since
        wait.moved()
        assert wait.since > begun and mine() == ["test of weights"]
    finally:
        wait.end()
    wait.end()
    assert mine() == []


async def test_a_request_is_a_detail_of_what_it_is_made_for() -> None:
    async def outlives() -> None:
        with waiting("test detail of nothing", is_detail=True):
            await asyncio.sleep(60)

    with waiting("test of a chunk"):
        with waiting("test of a request", is_detail=True), waiting("test of a source"):
            told = [wait.what for wait in open_waits(nested=False) if wait.what.startswith("test")]
            assert sorted(told) == ["test of a chunk", "test of a source"]
            assert sorted(mine()) == ["test of a chunk", "test of a request", "test of a source"]
        task = asyncio.create_task(outlives())
        await asyncio.sleep(0)
    told = [wait.what for wait in open_waits(nested=False) if wait.what.startswith("test")]
    assert told == ["test detail of nothing"], "it is part of nothing any more, so it is told itself"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_waits_of_threads_are_listed_too() -> None:
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        with waiting("test of a thread"):
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10) and mine() == ["test of a thread"]
    end.set()
    thread.join(10)
    assert mine() == []


def test_the_register_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "MAX_OPEN", len(open_waits()) + 2)
    before = waits.num_unlisted()
    with waiting("test 1"), waiting("test 2"), waiting("test 3"):
        assert len(mine()) == 2 and waits.num_unlisted() == before + 1
    assert mine() == []


def test_in_words() -> None:
    key = Identity.generate().public_key
    with waiting("chunk 3 of version 7", whom=key, deadline_s=30.0, usual_s=-1.0) as wait:
        record = wait.record()
        assert record.whom == node_id_of(key) and record.overdue
        assert in_words(record, "learner") == "chunk 3 of version 7 from learner, 0 s, deadline 30 s"
        assert f"from node {node_id_of(key)}, asked at " in wait.bounds()
    with waiting("test of a batch", until="enough rollouts are in") as wait:
        assert in_words(wait.record()) == "test of a batch, 0 s, until enough rollouts are in"
        assert not wait.record().overdue


async def test_a_request_names_whom_it_waits_for_and_its_deadline(listener: Fabric, node: Fabric) -> None:
    asked = asyncio.Event()

    async def never(_: Request) -> bytes:
        asked.set()
        await asyncio.sleep(60)
        return b""

    await listener.serve("never", never)
    key = listener.identity.public_key
    request = asyncio.create_task(node.request("never", b"", 2.0, to=key))
    async with asyncio.timeout(10):
        await asked.wait()
    (wait,) = [wait for wait in open_waits() if wait.what == "an answer on 'never'"]
    assert wait.whom == listener.identity.node_id and wait.deadline_s == 2.0 and wait.seconds < 10
    with pytest.raises(NetworkError, match=rf"no answer on 'never' within 2 s \(from node {wait.whom}, asked at "):
        await request
    assert not [wait for wait in open_waits() if wait.what == "an answer on 'never'"]
