"""Nodes in processes of their own: they find each other, and whoever dies or stops is missed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from swarm_nodes import ROOT, RUN, SECRET, identity, ids, join

from shoal.fabric.fabric import Fabric

Spawn = Callable[..., subprocess.Popen[str]]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


async def until_line(process: subprocess.Popen[str], wanted: str) -> None:
    """Read what a peer prints until it prints this."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while (line := await asyncio.to_thread(process.stdout.readline)) and line.strip() != wanted:
            pass
    assert line, "the peer ended"


async def test_processes_find_and_miss_each_other(
    spawn: Spawn, stack: AsyncExitStack, listener: Fabric, eventually: Eventually,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    root = await join(stack, ROOT, listener)
    ticket = listener.ticket(RUN, SECRET).encode()
    peers = [spawn(ticket, f"peer {n}") for n in range(3)]
    names = [identity(f"peer {n}").node_id for n in range(3)]
    await asyncio.gather(*(until_line(p, " ".join(sorted([ROOT.node_id, *names]))) for p in peers))
    await eventually(lambda: ids(root) == {ROOT.node_id, *names})

    peers[0].kill()
    started = time.monotonic()
    await eventually(lambda: names[0] not in ids(root))
    record_property("detect_kill_s", time.monotonic() - started)
    await until_line(peers[1], " ".join(sorted([ROOT.node_id, *names[1:]])))

    peers[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    await eventually(lambda: names[1] not in ids(root))
    record_property("detect_stop_s", time.monotonic() - started)
    await until_line(peers[2], " ".join(sorted([ROOT.node_id, names[2]])))
    assert {n.id for n in root.roster.nodes(time.time(), absent=True)} >= {names[1], names[2]}

    peers[1].send_signal(signal.SIGCONT)
    await until_line(peers[2], " ".join(sorted([ROOT.node_id, *names[1:]])))
    # The same node again, in a new process and with nothing remembered.
    again = spawn(ticket, "peer 0")
    await until_line(again, " ".join(sorted([ROOT.node_id, *names])))
    await eventually(lambda: ids(root) == {ROOT.node_id, *names})
    assert not root.roster.evidence
