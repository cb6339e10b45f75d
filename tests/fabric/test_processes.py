"""Nodes in processes of their own: stopped, killed, cut off, and ended without a goodbye."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from shoal.errors import NetworkError
from shoal.fabric.alive import AliveWatch, Change
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.fabric.ticket import Ticket

Process = subprocess.Popen[str]
Spawn = Callable[..., Process]
Remote = tuple[Process, Ticket]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]
SECRET = b"s" * 16


def line_of(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def change(watch: AliveWatch) -> Change:
    async with asyncio.timeout(20):
        return await anext(watch)


async def test_requests_to_another_process(remote: Remote) -> None:
    _, ticket = remote
    async with await Fabric.connect(Identity.generate(), ticket) as node:
        to = ticket.coordinator_key
        assert await node.request("echo", b"hello", 5.0, to=to) == b"hello"
        assert await node.request("size", b"%d" % 2**23, 20.0, to=to) == bytes(2**23)
        with pytest.raises(RemoteError, match="it does not fit. Bring less."):
            await node.request("no", b"", 5.0, to=to)


async def test_stopped_peer_meets_the_deadline(remote: Remote) -> None:
    process, ticket = remote
    async with await Fabric.connect(Identity.generate(), ticket) as node:
        await node.request("echo", b"", 5.0)
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(NetworkError):
            await node.request("echo", b"", 1.0)
        assert time.monotonic() - started >= 0.9
        process.send_signal(signal.SIGCONT)
        assert await node.request("echo", b"back", 20.0, absent_grace_s=20.0) == b"back"


async def test_stopped_listener_is_a_dead_address(remote: Remote) -> None:
    process, ticket = remote
    process.send_signal(signal.SIGSTOP)
    # On a busy machine its threads go on for a moment.
    await asyncio.to_thread(os.waitpid, process.pid, os.WUNTRACED)
    with pytest.raises(NetworkError):
        await Fabric.connect(Identity.generate(), ticket, 1.0)
    process.send_signal(signal.SIGCONT)


async def test_node_that_takes_nothing_does_not_hold_up_the_others(spawn: Spawn, eventually: Eventually) -> None:
    asked = 0

    async def size(request: Request) -> bytes:
        nonlocal asked
        asked += 1
        return bytes(int(request.body))

    # With this lease nobody is given up during the test: only the room's own care keeps the others going.
    async with await Fabric.listen(Identity.generate(), lease_s=60.0) as listener:
        ticket = listener.ticket("a run", SECRET)
        await listener.serve("size", size, concurrency=100)
        hog = spawn("hog", ticket.encode())
        other = spawn("connect", ticket.encode())
        node_id = await asyncio.to_thread(line_of, other)
        await eventually(lambda: asked > 10)
        hog.send_signal(signal.SIGSTOP)
        async with await Fabric.connect(Identity.generate(), ticket, lease_s=60.0) as third:
            for _ in range(20):
                assert await listener.request(f"{node_id}/echo", b"x", 20.0) == b"x"
                assert await third.request("size", b"5", 20.0) == bytes(5)
        hog.kill()


async def test_close_does_not_wait_for_a_stopped_peer(remote: Remote) -> None:
    process, ticket = remote
    node = await Fabric.connect(Identity.generate(), ticket)
    await node.declare_alive()
    process.send_signal(signal.SIGSTOP)
    questions = [asyncio.create_task(node.request("echo", bytes(2**20), 60.0)) for _ in range(20)]
    await asyncio.sleep(0.3)
    async with asyncio.timeout(10):
        await node.close(3.0)
    for question in questions:
        question.cancel()
    await asyncio.gather(*questions, return_exceptions=True)
    process.send_signal(signal.SIGCONT)


async def test_watch_sees_who_comes_dies_and_is_there_already(spawn: Spawn) -> None:
    async with (
        await Fabric.listen(Identity.generate()) as listener,
        await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET)) as observer,
        listener.watch_alive() as at_listener,
        observer.watch_alive() as at_observer,
    ):
        process = spawn("connect", listener.ticket("a run", SECRET).encode())
        node_id = await asyncio.to_thread(line_of, process)
        assert await change(at_listener) == Change(node_id, True)
        assert await change(at_observer) == Change(node_id, True)
        async with listener.watch_alive() as late:
            assert await change(late) == Change(node_id, True)
            assert late.present == {node_id}
        process.kill()
        assert await change(at_listener) == Change(node_id, False)
        assert await change(at_observer) == Change(node_id, False)
        assert at_listener.present == frozenset()


async def test_stopped_node_is_given_up_after_the_lease(spawn: Spawn) -> None:
    async with await Fabric.listen(Identity.generate()) as listener, listener.watch_alive() as watch:
        process = spawn("connect", listener.ticket("a run", SECRET).encode())
        node_id = await asyncio.to_thread(line_of, process)
        assert await change(watch) == Change(node_id, True)
        process.send_signal(signal.SIGSTOP)
        assert await change(watch) == Change(node_id, False)
        process.send_signal(signal.SIGCONT)
        assert await change(watch) == Change(node_id, True)


async def test_node_is_alive_while_one_of_its_sessions_is() -> None:
    identity = Identity.generate()
    async with await Fabric.listen(Identity.generate()) as listener, listener.watch_alive() as watch:
        old = await Fabric.connect(identity, listener.ticket("a run", SECRET))
        await old.declare_alive()
        assert await change(watch) == Change(identity.node_id, True)
        new = await Fabric.connect(identity, listener.ticket("a run", SECRET))
        await new.declare_alive()
        await asyncio.sleep(0.3)
        await old.close()
        await asyncio.sleep(0.3)
        assert watch.present == {identity.node_id} and watch._unread.get(identity.node_id) is not False
        await new.close()
        assert await change(watch) == Change(identity.node_id, False)


async def test_killed_listener_is_noticed_by_whoever_asks(remote: Remote) -> None:
    process, ticket = remote
    async with await Fabric.connect(Identity.generate(), ticket) as node:
        await node.request("echo", b"", 5.0)
        process.kill()
        with pytest.raises(NetworkError, match="nobody answers"):
            await node.request("echo", b"", 30.0)


def test_closed_node_lets_its_process_end(spawn: Spawn) -> None:
    listener = spawn("listen")
    ticket = line_of(listener)
    asking = spawn("ask", ticket, "echo")
    assert asking.communicate(timeout=20)[0].strip() == "answer from afar" and asking.returncode == 0
    listener.communicate(timeout=20)
    assert listener.returncode == 0


def test_forgotten_node_does_not_keep_its_process(spawn: Spawn) -> None:
    ticket = line_of(spawn("listen"))
    careless = spawn("gone", ticket)
    assert "answer" in careless.communicate(timeout=20)[0]


def test_import_is_light() -> None:
    code = "import shoal.fabric.fabric, shoal.broadcast.fetch, sys; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def ip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], check=False, capture_output=True, text=True)


@pytest.fixture
def namespace() -> Iterator[tuple[str, str]]:
    """A network namespace joined to this one by a cable; yields its name and this end's address."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making a network namespace needs root and iproute2")
    name, here, there = f"shoal-test-{os.getpid()}", f"sh{os.getpid() % 10**6}a", f"sh{os.getpid() % 10**6}b"
    made = ip("netns", "add", name)
    if made.returncode != 0:
        pytest.skip(f"this kernel or container makes no network namespace: {made.stderr.strip()}")
    try:
        for command in (
            ("link", "add", here, "type", "veth", "peer", "name", there, "netns", name),
            ("addr", "add", "10.213.77.1/30", "dev", here),
            ("link", "set", here, "up"),
            ("-n", name, "addr", "add", "10.213.77.2/30", "dev", there),
            ("-n", name, "link", "set", there, "up"),
        ):
            done = ip(*command)
            assert done.returncode == 0, done.stderr
        yield name, "10.213.77.1"
    finally:
        ip("link", "del", here)
        ip("netns", "del", name)


@pytest.mark.netns
async def test_join_over_tls_from_another_namespace(
    namespace: tuple[str, str], spawn: Spawn, eventually: Eventually
) -> None:
    name, address = namespace
    enter = ("ip", "netns", "exec", name)
    async with await Fabric.listen(Identity.generate(), address) as listener, listener.watch_alive() as watch:
        ticket = listener.ticket("a run", SECRET)
        assert ticket.endpoints[0].startswith(f"tls/{address}:")
        process = spawn("connect", ticket.encode(), prefix=enter)
        node_id = await asyncio.to_thread(line_of, process)
        assert await change(watch) == Change(node_id, True)
        assert await listener.request(f"{node_id}/size", b"%d" % 2**23, 20.0) == bytes(2**23)

        wrong = msgspec.structs.replace(ticket, coordinator_key=Identity.generate().public_key)
        refused = spawn("connect", wrong.encode(), prefix=enter)
        assert "is not the ticket's" in await asyncio.to_thread(line_of, refused)

        # The cable is cut: no socket closes, only the lease tells.
        ip("link", "set", f"sh{os.getpid() % 10**6}a", "down")
        assert await change(watch) == Change(node_id, False)
        ip("link", "set", f"sh{os.getpid() % 10**6}a", "up")
        assert await change(watch) == Change(node_id, True)
        assert Path(f"/proc/{process.pid}").exists()
