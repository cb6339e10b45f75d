"""Runs that reach each other through routers: processes of their own, killed, restarted, doubled."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal import PROTOCOL_VERSION
from shoal.errors import NetworkError, TicketError
from shoal.fabric.alive import AliveWatch, Change
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.router import Router
from shoal.fabric.service import Request
from shoal.fabric.ticket import MAX_ENDPOINTS, RouterAddress, Ticket
from shoal.fabric.topic import Subscription

SECRET = b"0123456789abcdef"


class RouterProcess:
    """`shoal router` in a process of its own."""

    def __init__(self, home: Path, port: int = 0) -> None:
        import shoal

        env = os.environ | {"SHOAL_HOME": str(home), "PYTHONPATH": str(Path(shoal.__file__).parents[1])}
        command = [sys.executable, "-m", "shoal.cli", "router", "--host", "127.0.0.1", "--port", str(port), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.address = RouterAddress.decode(said["line"])
        self.port: int = said["port"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


StartRouter = Callable[..., RouterProcess]


@pytest.fixture
def start_router(tmp_path: Path) -> Iterator[StartRouter]:
    """Starts a router with the identity of a name; whatever is left at the end is killed."""
    started: list[RouterProcess] = []

    def start(name: str = "router", port: int = 0) -> RouterProcess:
        started.append(RouterProcess(tmp_path / name, port))
        return started[-1]

    yield start
    for router in started:
        router.kill()
        assert router.process.stdout is not None
        router.process.stdout.close()


@asynccontextmanager
async def run_through(*routers: RouterAddress) -> AsyncIterator[tuple[Fabric, Ticket]]:
    """A coordinator that serves `echo` and is told to the others only through its routers."""
    async with await Fabric.listen(Identity.generate(), routers=routers) as coordinator:
        assert await coordinator.unconnected(10.0) == {}
        await coordinator.serve("echo", echo)
        await coordinator.declare_alive()
        yield coordinator, coordinator.ticket("a run", SECRET).elsewhere()


async def echo(request: Request) -> bytes:
    return request.body


async def answered(node: Fabric, to: bytes, deadline_s: float = 30.0) -> float:
    """Seconds until a request is answered, asked again and again."""
    started = time.monotonic()
    while True:
        try:
            assert await node.request("echo", b"x", 5.0, to=to) == b"x"
            return time.monotonic() - started
        except NetworkError:
            assert time.monotonic() - started < deadline_s


async def test_everybody_only_dials_out(start_router: StartRouter) -> None:
    router = await asyncio.to_thread(start_router)
    async with run_through(router.address) as (coordinator, ticket):
        assert ticket.endpoints == () and len(ticket.encode()) < 200
        to = coordinator.identity.public_key
        async with (
            await Fabric.connect(Identity.generate(), ticket) as first,
            await Fabric.connect(Identity.generate(), ticket) as second,
            second.watch_alive() as watch,
        ):
            await first.declare_alive()
            await first.serve("on/first", echo)
            body = bytes(range(256)) * 2**12
            assert await first.request("echo", body, 10.0, to=to) == body
            for other in (coordinator, second):
                assert await other.request("on/first", b"1", 10.0, to=first.identity.public_key) == b"1"
            async with asyncio.timeout(10):
                seen = {(await anext(watch)).node_id for _ in range(2)}
            assert seen == {coordinator.identity.node_id, first.identity.node_id}


async def test_router_that_is_killed_and_started_again(start_router: StartRouter) -> None:
    router = await asyncio.to_thread(start_router)
    async with run_through(router.address) as (coordinator, ticket), coordinator.watch_alive() as watch:
        to = coordinator.identity.public_key
        async with await Fabric.connect(Identity.generate(), ticket) as node:
            await node.declare_alive()
            await answered(node, to)
            router.kill()
            question = asyncio.create_task(answered(node, to))
            await asyncio.sleep(0.5)
            again = await asyncio.to_thread(start_router, port=router.port)
            assert again.address == router.address
            await question
            assert await coordinator.unconnected() == {} == await node.unconnected()
            # The coordinator lost its own connection: it does not take its nodes for dead.
            assert {change.alive for change in await changes(watch, 0.5)} == {True}
            assert node.identity.node_id in watch.present


async def changes(watch: AliveWatch, wait_s: float) -> list[Change]:
    found: list[Change] = []
    try:
        async with asyncio.timeout(wait_s):
            async for change in watch:
                found.append(change)
    except TimeoutError:
        pass
    return found


async def test_one_of_two_routers_is_killed(start_router: StartRouter) -> None:
    one, two = await asyncio.gather(*(asyncio.to_thread(start_router, name) for name in ("one", "two")))
    async with run_through(one.address, two.address) as (coordinator, ticket), coordinator.watch_alive() as watch:
        to = coordinator.identity.public_key
        async with await Fabric.connect(Identity.generate(), ticket) as node, node.subscribe("news") as news:
            await node.declare_alive()
            assert await node.unconnected(10.0) == {}
            await heard(coordinator, news, b"both")
            for router in (one, two):
                router.kill()
                await answered(node, to)
                await heard(coordinator, news, b"one")
                assert len(await coordinator.unconnected()) == 1
                await asyncio.to_thread(start_router, "one" if router is one else "two", router.port)
                for fabric in (node, coordinator):
                    await all_connected(fabric)
            assert {change.alive for change in await changes(watch, 0.5)} == {True}


async def all_connected(fabric: Fabric) -> None:
    for _ in range(400):
        if not await fabric.unconnected():
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"not connected: {await fabric.unconnected()}")


async def heard(speaker: Fabric, news: Subscription, body: bytes) -> None:
    """What is published is heard, and once only, by however many links it comes."""
    for _ in range(100):
        await speaker.publish("news", body, wait=True)
        try:
            async with asyncio.timeout(0.2):
                assert (await anext(news)).body == body
        except TimeoutError:
            continue
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(news)
        return
    pytest.fail("never heard anything")


async def test_router_that_comes_late_is_used(start_router: StartRouter) -> None:
    router = await asyncio.to_thread(start_router)
    router.kill()
    async with await Fabric.listen(Identity.generate(), routers=[router.address]) as coordinator:
        (problem,) = (await coordinator.unconnected(0.5)).values()
        assert problem
        await coordinator.serve("echo", echo)
        await asyncio.to_thread(start_router, port=router.port)
        ticket = coordinator.ticket("a run", SECRET).elsewhere()
        async with await Fabric.connect(Identity.generate(), ticket, 30.0) as node:
            await answered(node, coordinator.identity.public_key)


async def test_direct_address_is_preferred(start_router: StartRouter) -> None:
    async with await Router.open(Identity.generate(), "127.0.0.1", 0) as router:
        async with await Fabric.listen(Identity.generate(), routers=[router.address]) as coordinator:
            assert await coordinator.unconnected(10.0) == {}
            await coordinator.serve("echo", echo)
            async with await Fabric.connect(Identity.generate(), coordinator.ticket("a run", SECRET)) as node:
                assert await node.unconnected(10.0) == {}
                await node.request("echo", bytes(2**22), 10.0, to=coordinator.identity.public_key)
        traffic = router.traffic()
        assert traffic is None or traffic.bytes_received < 2**20


async def test_runs_on_one_router_do_not_hear_each_other(start_router: StartRouter) -> None:
    router = await asyncio.to_thread(start_router)
    async with (
        run_through(router.address) as (ours, ticket),
        run_through(router.address) as (theirs, their_ticket),
        await Fabric.connect(Identity.generate(), ticket) as node,
        await Fabric.connect(Identity.generate(), their_ticket) as stranger,
        stranger.watch_alive() as watch,
        stranger.subscribe("**") as everything,
        node.subscribe("news") as news,
    ):
        await node.declare_alive()
        await node.serve("only/here", echo)
        assert await ours.request("only/here", b"x", 10.0) == b"x"
        await heard(ours, news, b"ours")
        with pytest.raises(NetworkError, match="nobody answers"):
            await stranger.request("only/here", b"x", 5.0)
        assert (await node.ask("echo", b"", 5.0)).sender_key == ours.identity.public_key
        assert (await stranger.ask("echo", b"", 5.0)).sender_key == theirs.identity.public_key
        assert await changes(watch, 0.5) == [Change(theirs.identity.node_id, True)]
        await theirs.publish("other", b"theirs", wait=True)
        async with asyncio.timeout(10):
            assert (await anext(everything)).body == b"theirs"


async def test_somebody_else_at_the_routers_address(start_router: StartRouter) -> None:
    router = await asyncio.to_thread(start_router)
    false = RouterAddress(PROTOCOL_VERSION, Identity.generate().public_key, router.address.hosts)
    async with await Fabric.listen(Identity.generate(), routers=[false]) as coordinator:
        (problem,) = (await coordinator.unconnected(1.5)).values()
        assert "certificate" in problem
        with pytest.raises(NetworkError, match="certificate"):
            await Fabric.connect(Identity.generate(), coordinator.ticket("a run", SECRET).elsewhere(), 2.0)


def test_router_ends_when_told(start_router: StartRouter) -> None:
    router = start_router()
    router.process.send_signal(signal.SIGTERM)
    router.process.communicate(timeout=20)
    assert router.process.returncode == 0


def test_router_lines(tmp_path: Path) -> None:
    router = RouterAddress(
        PROTOCOL_VERSION, Identity.generate().public_key, ("relay.example.org:7447", "[2001:db8::7]:443")
    )
    line = router.encode()
    assert RouterAddress.decode(f" {line[:20]}\n{line[20:]} ") == router == RouterAddress.find(line)
    (tmp_path / "line").write_text(line + "\n")
    assert RouterAddress.find(str(tmp_path / "line")) == router
    for text, words in (
        (line[:-1], "cut off or mistyped"),
        (line[:30] + ("A" if line[30] != "A" else "B") + line[31:], "cut off or mistyped"),
        (Ticket(PROTOCOL_VERSION, "r", ("tls/1.2.3.4:5",), bytes(32), SECRET).encode(), "not a router line"),
        ("shoalr2" + line[7:], "another version"),
        (RouterAddress(PROTOCOL_VERSION + 1, router.key, router.hosts).encode(), "for protocol version"),
        (RouterAddress(PROTOCOL_VERSION, b"short", router.hosts).encode(), "cannot be used"),
        (RouterAddress(PROTOCOL_VERSION, router.key, ()).encode(), "cannot be used"),
        (RouterAddress(PROTOCOL_VERSION, router.key, ("nowhere",)).encode(), "cannot be used"),
        (RouterAddress(PROTOCOL_VERSION, router.key, ("a:1",) * (MAX_ENDPOINTS + 1)).encode(), "cannot be used"),
    ):
        with pytest.raises(TicketError, match=words):
            RouterAddress.decode(text)
    with pytest.raises(TicketError, match="neither a router line nor a file"):
        RouterAddress.find(str(tmp_path / "missing"))
    with pytest.raises(TicketError, match="not a join ticket"):
        Ticket.decode(line)
