"""A transfer whose serving side is stopped: it is named while it stands still, and goes on when that does."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.broadcast.fetch import Fetcher
from shoal.broadcast.store import Store
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.ticket import Ticket
from shoal.fabric.waits import in_words, open_waits
from shoal.protocol.status import Wait

LEARNER = Identity(b"learner".ljust(32))


def chunk_waits() -> list[Wait]:
    return [wait for wait in open_waits(nested=False) if wait.what.startswith("chunk ")]


@pytest.mark.timeout(300)
async def test_a_stopped_source_is_named_with_chunk_version_and_deadline(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    command = [sys.executable, str(Path(__file__).with_name("serve_store.py")), str(tmp_path / "theirs")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)  # noqa: ASYNC220
    try:
        assert process.stdout is not None
        ticket = Ticket.decode(await asyncio.to_thread(process.stdout.readline))
        async with await Fabric.connect(Identity.generate(), ticket) as node:
            store = Store(tmp_path / "mine", run="a run", trusted_key=LEARNER.public_key)
            fetcher = Fetcher(node, store, [ticket.coordinator_key])
            stopped = asyncio.Event()

            def stop_once(_: object) -> None:
                if not stopped.is_set():
                    process.send_signal(signal.SIGSTOP)
                    stopped.set()

            fetching = asyncio.create_task(fetcher.fetch(2, on_progress=stop_once))
            async with asyncio.timeout(60):
                await stopped.wait()
                while not any(wait.overdue for wait in chunk_waits()):
                    assert not fetching.done(), fetching
                    await asyncio.sleep(0.1)
            wait = next(wait for wait in chunk_waits() if wait.overdue)
            assert wait.whom == node_id_of(ticket.coordinator_key) and wait.deadline_s > wait.seconds
            assert wait.what.endswith("of version 2")
            assert in_words(wait, "learner").startswith(f"{wait.what} from learner, {wait.seconds:.0f} s, deadline ")
            process.send_signal(signal.SIGCONT)
            # An answer lost with the connection is asked for again.
            snapshot = await asyncio.wait_for(fetching, 150)
            assert bytes(snapshot.tensors["w"].data) == random.Random(2).randbytes(30_000_001)
            assert chunk_waits() == []
    finally:
        process.kill()
        process.communicate()
