"""Requests between nodes: answers, refusals, limits, and messages that must not be believed."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
import zenoh

from shoal.errors import CapacityError, NetworkError
from shoal.fabric import service as service_module
from shoal.fabric.core import namespace_of
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.envelope import write_envelope
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.fabric.session import open_connector

SECRET = b"0123456789abcdef"
Eventually = Callable[[Callable[[], object]], Awaitable[None]]
Pair = tuple[Fabric, Fabric]


async def echo(request: Request) -> bytes:
    return request.body


async def test_request_and_reply(pair: Pair) -> None:
    listener, node = pair
    seen: list[Request] = []

    async def handle(request: Request) -> bytes:
        seen.append(request)
        return request.body[::-1]

    await listener.serve("reverse/*", handle)
    to = listener.identity.public_key
    assert await node.request("reverse/it", b"abc", 5.0, to=to) == b"cba"
    assert seen == [Request(node.identity.node_id, node.identity.public_key, b"abc", "reverse/it")]
    assert await node.request("reverse/it", b"", 5.0) == b""
    answer = await node.ask("reverse/it", b"x", 5.0)
    assert answer.sender_key == to


async def test_large_bodies_both_ways(pair: Pair) -> None:
    listener, node = pair
    await listener.serve("echo", echo)
    body = bytes(range(256)) * (2**16)
    assert await node.request("echo", body, 30.0) == body


async def test_both_directions_and_between_connected_nodes(pair: Pair) -> None:
    listener, node = pair
    async with await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET)) as other:
        await node.serve("on/node", echo)
        to = node.identity.public_key
        assert await listener.request("on/node", b"1", 5.0, to=to) == b"1"
        assert await other.request("on/node", b"2", 5.0, to=to) == b"2"
        assert await node.request("on/node", b"3", 5.0, to=to) == b"3"


async def test_refusals(listener: Fabric, node: Fabric) -> None:
    async def refuse(request: Request) -> bytes:
        raise CapacityError("it does not fit.", "Bring less.")

    async def crash(request: Request) -> bytes:
        raise ZeroDivisionError("a secret detail")

    await listener.serve("refuse", refuse)
    await listener.serve("crash", crash)
    await listener.serve("small", echo, max_bytes=10)
    await listener.serve("closed", echo, allow=lambda key: key == bytes(32))
    with pytest.raises(RemoteError, match="it does not fit. Bring less.") as caught:
        await node.request("refuse", b"", 5.0)
    assert (caught.value.kind, caught.value.error_type) == ("refused", "CapacityError")
    with pytest.raises(RemoteError) as caught:
        await node.request("crash", b"", 5.0)
    assert caught.value.kind == "internal" and "secret detail" not in str(caught.value)
    with pytest.raises(RemoteError, match="11 bytes exceeds the limit of 10") as caught:
        await node.request("small", b"x" * 11, 5.0)
    assert caught.value.kind == "size"
    with pytest.raises(RemoteError, match="not been admitted") as caught:
        await node.request("closed", b"", 5.0)
    assert caught.value.kind == "stranger"
    survived = [f"refused.{kind}" for kind in ("refused", "internal", "size", "stranger")]
    assert listener.counters == dict.fromkeys([*survived, "handler_failed"], 1)
    assert await node.request("small", b"x" * 10, 5.0) == b"x" * 10


async def test_reply_larger_than_allowed(listener: Fabric, node: Fabric) -> None:
    await listener.serve("echo", echo)
    with pytest.raises(NetworkError, match="exceeds the limit of 10 bytes"):
        await node.request("echo", b"x" * 11, 5.0, max_reply_bytes=10)


async def test_nobody_there(listener: Fabric, node: Fabric) -> None:
    with pytest.raises(NetworkError, match="nobody answers on 'nothing/here'"):
        await node.request("nothing/here", b"", 5.0, absent_grace_s=0.0)


async def test_server_that_comes_late_is_found(listener: Fabric, node: Fabric) -> None:
    question = asyncio.create_task(node.request("late", b"x", 10.0, absent_grace_s=10.0))
    await asyncio.sleep(0.3)
    await listener.serve("late", echo)
    assert await question == b"x"


async def test_deadline(listener: Fabric, node: Fabric) -> None:
    cancelled = asyncio.Event()

    async def never(request: Request) -> bytes:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    await listener.serve("never", never)
    with pytest.raises(NetworkError, match=r"no answer on 'never' within 0.3 s"):
        await node.request("never", b"", 0.3)
    async with asyncio.timeout(5):
        await cancelled.wait()  # The handler does not outlive the patience of whoever asked.
    assert listener.counters == {"deadline_passed": 1}


async def test_full_queue_says_busy_and_recovers(listener: Fabric, node: Fabric) -> None:
    gate = asyncio.Event()
    running = 0

    async def wait(request: Request) -> bytes:
        nonlocal running
        running += 1
        await gate.wait()
        return request.body

    await listener.serve("busy", wait, concurrency=2, backlog=1)
    questions = [asyncio.create_task(node.request("busy", b"x", 20.0)) for _ in range(8)]
    done: set[asyncio.Task[bytes]] = set()
    async with asyncio.timeout(10):
        while len(done) < 5:
            done, _ = await asyncio.wait(questions, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION)
    kinds = [error.kind for task in done if isinstance(error := task.exception(), RemoteError)]
    assert kinds == ["busy"] * 5 and running == 2
    gate.set()
    answers = await asyncio.gather(*questions, return_exceptions=True)
    assert answers.count(b"x") == 3
    assert await node.request("busy", b"again", 5.0) == b"again"


async def test_large_bodies_fill_the_queue_too(listener: Fabric, node: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_QUEUED_BYTES", 250)
    gate = asyncio.Event()

    async def wait(request: Request) -> bytes:
        await gate.wait()
        return request.body

    await listener.serve("busy", wait)
    questions = [asyncio.create_task(node.request("busy", bytes(100), 20.0)) for _ in range(3)]
    (refused,), _ = await asyncio.wait(questions, timeout=10, return_when=asyncio.FIRST_EXCEPTION)
    assert isinstance(error := refused.exception(), RemoteError) and error.kind == "busy"
    gate.set()
    answers = await asyncio.gather(*questions, return_exceptions=True)
    assert answers.count(bytes(100)) == 2
    assert await node.request("busy", bytes(250), 5.0) == bytes(250)


async def test_closed_service_answers_no_more(listener: Fabric, node: Fabric) -> None:
    service = await listener.serve("once", echo)
    assert await node.request("once", b"x", 5.0) == b"x"
    await service.close()
    await service.close()
    with pytest.raises(NetworkError, match="nobody answers"):
        await node.request("once", b"x", 5.0, absent_grace_s=0.0)
    await listener.serve("once", echo)
    assert await node.request("once", b"x", 5.0) == b"x"


class Attacker:
    """A connected program that speaks Zenoh but not by the rules."""

    def __init__(self, listener: Fabric) -> None:
        endpoint = Endpoint.parse(listener.endpoints[0])
        self.session = open_connector(listener.identity.public_key, endpoint, 5.0, 2.0)
        self.namespace = namespace_of(listener.identity.public_key)

    def ask(self, key: str, body: bytes, attachment: bytes | None) -> list[zenoh.Reply]:
        return list(self.session.get(self.namespace + key, payload=body, attachment=attachment, timeout=3.0))


@pytest.fixture
async def attacker(listener: Fabric):  # type: ignore[no-untyped-def]
    attacker = await asyncio.to_thread(Attacker, listener)
    yield attacker
    await asyncio.to_thread(attacker.session.close)


async def test_forged_requests_never_reach_the_handler(listener: Fabric, attacker: Attacker) -> None:
    handled: list[bytes] = []

    async def handle(request: Request) -> bytes:
        handled.append(request.body)
        return b"ok"

    await listener.serve("door", handle)
    await listener.serve("window", handle)
    victim, now = Identity.generate(), time.time()

    def sealed(body: bytes = b"x", at: float = now, to: bytes = b"") -> bytes:
        return write_envelope(victim, "request", "door", body, now=at, to=to, deadline_s=3.0).attachment

    good = sealed()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    attacks: list[tuple[str, str, bytes, bytes | None]] = [
        ("signature", "door", b"x", flipped),
        ("signature", "door", b"y", good),
        ("key", "window", b"x", good),
        ("clock", "door", b"x", sealed(at=now - 1000)),
        ("clock", "door", b"x", sealed(at=now + 1000)),
        ("audience", "door", b"x", sealed(to=Identity.generate().public_key)),
        ("key", "door", b"x", write_envelope(victim, "publication", "door", b"x", now=now, deadline_s=3.0).attachment),
        ("malformed", "door", b"x", None),
        ("malformed", "door", b"x", b"rubbish"),
    ]
    for kind, key, body, attachment in attacks:
        before = listener.counters[f"refused.{kind}"]
        await asyncio.to_thread(attacker.ask, key, body, attachment)
        assert listener.counters[f"refused.{kind}"] == before + 1, kind
    assert handled == []
    await asyncio.to_thread(attacker.ask, "door", b"x", good)
    assert handled == [b"x"]
    await asyncio.to_thread(attacker.ask, "door", b"x", good)
    assert handled == [b"x"] and listener.counters["refused.replay"] == 1


async def test_pattern_queries_are_not_requests(listener: Fabric, attacker: Attacker) -> None:
    handled: list[bytes] = []

    async def handle(request: Request) -> bytes:
        handled.append(request.body)
        return b"ok"

    await listener.serve("door", handle)
    attachment = write_envelope(Identity.generate(), "request", "door", b"", now=time.time(), deadline_s=3.0).attachment
    await asyncio.to_thread(attacker.ask, "**", b"", attachment)
    assert handled == []


async def test_impostors_answers_are_ignored(listener: Fabric, node: Fabric, attacker: Attacker) -> None:
    """A node that serves another's key can neither answer for it nor keep its answer away."""
    impostor = Identity.generate()
    recorded: list[bytes] = []

    def lie(query: zenoh.Query) -> None:
        attachment = write_envelope(impostor, "reply", "truth", b"lie", now=time.time()).attachment
        query.reply(query.key_expr, b"lie", attachment=attachment)
        query.reply(query.key_expr, b"lie")
        for old in recorded:
            query.reply(query.key_expr, b"truth", attachment=old)
        query.drop()

    queryable = attacker.session.declare_queryable(attacker.namespace + "truth", lie, complete=True)
    with pytest.raises(NetworkError):
        await node.request("truth", b"", 2.0, absent_grace_s=0.0)

    async def tell(request: Request) -> bytes:
        await asyncio.sleep(0.2)
        return b"truth"

    recorded.append(
        write_envelope(listener.identity, "reply", "truth", b"truth", now=time.time(), answers=bytes(16)).attachment
    )
    await listener.serve("truth", tell)
    ignored = node.counters.total()
    assert await node.request("truth", b"", 5.0, to=listener.identity.public_key) == b"truth"
    assert node.counters.total() == ignored + 3
    queryable.undeclare()


async def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NetworkError, match=f"port {port} on 127.0.0.1 is taken .* Choose another port"):
            await Fabric.listen(Identity.generate(), port=port)
    async with await Fabric.listen(Identity.generate(), port=port) as fabric:
        assert fabric.endpoints == (f"tcp/127.0.0.1:{port}",)


async def test_where_to_listen() -> None:
    with pytest.raises(NetworkError, match="would send everything in the clear"):
        await Fabric.listen(Identity.generate(), "0.0.0.0", tls=False)
    with pytest.raises(NetworkError, match="host name 'no.such.host.invalid' is unknown"):
        await Fabric.listen(Identity.generate(), "no.such.host.invalid")
    with pytest.raises(NetworkError, match="cannot listen on port .* of 192.0.2.1"):
        await Fabric.listen(Identity.generate(), "192.0.2.1")
    async with await Fabric.listen(Identity.generate(), "0.0.0.0") as fabric:
        assert all(endpoint.startswith("tls/") for endpoint in fabric.endpoints)
        assert any("127.0.0.1" in endpoint for endpoint in fabric.endpoints)
        async with await Fabric.connect(Identity.generate(), fabric.ticket("a run", SECRET)) as node:
            await fabric.serve("echo", echo)
            assert await node.request("echo", b"x", 5.0) == b"x"


async def test_wrong_pin_is_told_from_a_dead_address() -> None:
    async with await Fabric.listen(Identity.generate(), tls=True) as fabric:
        ticket = fabric.ticket("a run", SECRET)
        other = type(ticket)(1, "a run", fabric.endpoints, Identity.generate().public_key, SECRET)
        with pytest.raises(NetworkError, match="shows a certificate that is not the ticket's"):
            await Fabric.connect(Identity.generate(), other, 5.0)
    with pytest.raises(NetworkError, match="cannot be reached: Connection refused"):
        await Fabric.connect(Identity.generate(), ticket, 0.7)


async def test_pin_protects_without_the_trial_too() -> None:
    """The trial handshake only explains: Zenoh itself refuses a listener that is not the ticket's."""
    async with await Fabric.listen(Identity.generate(), tls=True) as fabric:
        endpoint = Endpoint.parse(fabric.endpoints[0])
        with pytest.raises(NetworkError):
            await asyncio.to_thread(open_connector, Identity.generate().public_key, endpoint, 1.0, 2.0)


async def test_something_else_at_the_address() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with await Fabric.listen(Identity.generate()) as fabric:
            ticket = fabric.ticket("a run", SECRET)
        for scheme, reason in (("tls", "does not speak TLS"), ("tcp", "does not answer as a Shoal node")):
            elsewhere = type(ticket)(1, "a run", (f"{scheme}/127.0.0.1:{port}",), ticket.coordinator_key, SECRET)
            with pytest.raises(NetworkError, match=reason):
                await Fabric.connect(Identity.generate(), elsewhere, 1.0)


async def test_second_endpoint_is_used_when_the_first_is_dead(listener: Fabric) -> None:
    ticket = listener.ticket("a run", SECRET)
    both = type(ticket)(1, "a run", ("tcp/127.0.0.1:1", *listener.endpoints), ticket.coordinator_key, SECRET)
    async with await Fabric.connect(Identity.generate(), both, 5.0) as node:
        await listener.serve("echo", echo)
        assert await node.request("echo", b"x", 5.0) == b"x"


async def test_restarted_listener_keeps_its_tickets() -> None:
    """Same identity, same port: an old ticket stays valid over TLS, and connected nodes come back by themselves."""
    identity = Identity.generate()
    first = await Fabric.listen(identity, tls=True)
    ticket = first.ticket("a run", SECRET)
    async with await Fabric.connect(Identity.generate(), ticket) as node:
        await first.close()
        port = Endpoint.parse(ticket.endpoints[0]).port
        async with await Fabric.listen(identity, port=port, tls=True) as second:
            await second.serve("echo", echo)
            assert await node.request("echo", b"x", 20.0, absent_grace_s=20.0) == b"x"
            async with await Fabric.connect(Identity.generate(), ticket) as late:
                assert await late.request("echo", b"y", 5.0) == b"y"


async def test_close_leaves_nothing_running(listener: Fabric, eventually: Eventually) -> None:
    node = await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET))

    async def never(request: Request) -> bytes:
        await asyncio.sleep(60)
        return b""

    await node.serve("never", never)
    question = asyncio.create_task(listener.request("never", b"", 30.0))
    await eventually(lambda: any("Service" in str(task.get_coro()) for task in asyncio.all_tasks()))
    await node.close()
    await node.close()
    with pytest.raises(NetworkError):
        await question
    await eventually(lambda: not any(t.name.startswith("shoal-fabric-close") for t in threading.enumerate()))
    assert not any("Service" in str(task.get_coro()) for task in asyncio.all_tasks())
