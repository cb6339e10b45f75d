"""What whoever relays can see and do: nothing of what was said, and nothing that is believed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import zenoh
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CapacityError, NetworkError
from shoal.fabric import call as call_module
from shoal.fabric import service as service_module
from shoal.fabric.core import Core, namespace_of
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.envelope import Seal, write_envelope
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.router import Router
from shoal.fabric.sealing import SealingKey
from shoal.fabric.service import Request
from shoal.fabric.session import open_connector
from shoal.fabric.stream import InStream

SECRET = b"0123456789abcdef"
PROMPT, ANSWER, FRAME, NEWS = b"a planted prompt", b"a planted answer", b"a planted frame!", b"a planted notice"
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


class Eavesdropper:
    """A raw session on the router that subscribes to everything and says that it serves everything.

    It sees requests and publications; a relay sees answers too, so every answer that comes back here is kept as well.
    """

    def __init__(self, router: Router) -> None:
        endpoint = Endpoint.parse(f"tls/{router.address.hosts[0]}")
        self.session = open_connector(router.address.key, endpoint, 5.0, 2.0)
        self.seen: list[tuple[str, bytes, bytes]] = []
        self._held = [
            self.session.declare_subscriber("**", self._publication),
            self.session.declare_queryable("**", self._request, complete=True),
        ]

    def _publication(self, sample: zenoh.Sample) -> None:
        attachment = b"" if sample.attachment is None else sample.attachment.to_bytes()
        self.seen.append((str(sample.key_expr), sample.payload.to_bytes(), attachment))

    def _request(self, query: zenoh.Query) -> None:
        body = b"" if query.payload is None else query.payload.to_bytes()
        attachment = b"" if query.attachment is None else query.attachment.to_bytes()
        self.seen.append((str(query.key_expr), body, attachment))

    def ask(self, key: str, body: bytes, attachment: bytes) -> list[zenoh.Sample]:
        """Send bytes of one's own making and keep what comes back."""
        answers = [r.ok for r in self.session.get(key, payload=body, attachment=attachment, timeout=3.0)]
        return [answer for answer in answers if answer is not None]


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with await Router.open(Identity.generate(), "127.0.0.1", 0) as router:
        yield router


@pytest.fixture
async def coordinator(router: Router) -> AsyncIterator[Fabric]:
    async with await Fabric.listen(Identity.generate(), routers=[router.address]) as fabric:
        assert await fabric.unconnected(10.0) == {}
        yield fabric


@pytest.fixture
async def node(coordinator: Fabric) -> AsyncIterator[Fabric]:
    async with await Fabric.connect(Identity.generate(), coordinator.ticket("r", SECRET).elsewhere()) as fabric:
        yield fabric


@pytest.fixture
async def eve(router: Router) -> AsyncIterator[Eavesdropper]:
    eavesdropper = await asyncio.to_thread(Eavesdropper, router)
    await asyncio.sleep(0.3)
    yield eavesdropper
    await asyncio.to_thread(eavesdropper.session.close)


async def answer(request: Request) -> bytes:
    return ANSWER if request.body == PROMPT else request.body


async def test_a_router_reads_nothing_that_is_said_to_one_node(
    coordinator: Fabric, node: Fabric, eve: Eavesdropper, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[bytes] = []
    write = Core.write

    async def kept(core: Core, kind: str, *args: object, **named: object) -> object:
        envelope = await write(core, kind, *args, **named)  # type: ignore[arg-type]
        if kind in ("reply", "refusal"):
            replies.append(envelope.body)
        return envelope

    monkeypatch.setattr(Core, "write", kept)

    async def refuse(request: Request) -> bytes:
        raise CapacityError(f"refused: {request.body.decode()}")

    frames: list[bytes] = []

    async def read(incoming: InStream) -> None:
        frames.extend([frame async for frame in incoming])

    to = coordinator.identity.public_key
    await coordinator.serve("run/lease", answer)
    await coordinator.serve("run/refuse", refuse)
    await coordinator.accept_streams("acts", read)
    assert await node.request("run/lease", PROMPT, 10.0, to=to) == ANSWER
    with pytest.raises(RemoteError, match="refused: a planted prompt"):
        await node.request("run/refuse", PROMPT, 10.0, to=to)
    async with node.open_stream(to, "acts") as out:
        await out.send(FRAME)
    assert frames == [FRAME]
    await node.publish("news", NEWS, wait=True)
    # Where nothing is sealed it does see everything: a detector that finds nothing would prove nothing.
    assert await node.request("run/lease", PROMPT, 10.0) == ANSWER
    await eventually(lambda: any(NEWS in body for _, body, _ in eve.seen))
    assert sum(PROMPT in body for _, body, _ in eve.seen) == 1
    assert sum(ANSWER in body for body in replies) == 1
    sealed = [(key, body, attachment) for key, body, attachment in eve.seen if PROMPT not in body and NEWS not in body]
    kinds = {key.split("/")[-1] for key, _, _ in sealed}
    assert {"lease", "refuse", "acts", "hello"} <= kinds, "they went through the router"
    for _, body, attachment in sealed:
        assert not any(word in body + attachment for word in (PROMPT, FRAME, ANSWER))
    assert sum(b"planted" in body for body in replies) == 1


def sealed_for(reader: Fabric, key: str, body: bytes, own: SealingKey, sender: Identity, **changes: object):  # type: ignore[no-untyped-def]
    fields = {"now": time.time(), "to": reader.identity.public_key, "deadline_s": 3.0} | changes
    return write_envelope(sender, "request", key, body, seal=Seal(own, reader.sealing_key), **fields)  # type: ignore[arg-type]


async def test_tampered_replayed_and_misaddressed(coordinator: Fabric, node: Fabric, eve: Eavesdropper) -> None:
    handled: list[bytes] = []

    async def handle(request: Request) -> bytes:
        handled.append(request.body)
        return b"done"

    await coordinator.serve("door", handle)
    await coordinator.serve("window", handle)
    await asyncio.sleep(0.3)
    sender, own = Identity.generate(), SealingKey.generate()
    prefix = namespace_of(coordinator.identity.public_key)
    good = sealed_for(coordinator, "door", PROMPT, own, sender)
    other = sealed_for(node, "door", PROMPT, own, sender)
    plain = write_envelope(
        sender, "request", "door", PROMPT, now=time.time(), to=coordinator.identity.public_key, deadline_s=3.0
    )
    wrong_key = write_envelope(
        sender,
        "request",
        "door",
        PROMPT,
        now=time.time(),
        to=coordinator.identity.public_key,
        deadline_s=3.0,
        seal=Seal(own, SealingKey.generate().public_key),
    )
    changed = bytes([good.body[0] ^ 1]) + good.body[1:]
    for kind, key, body, attachment in (
        ("signature", "door", changed, good.attachment),
        ("key", "window", good.body, good.attachment),
        ("audience", "door", other.body, other.attachment),
        ("seal", "door", plain.body, plain.attachment),
        ("seal", "door", wrong_key.body, wrong_key.attachment),
        ("signature", "door", PROMPT, good.attachment),
    ):
        before = coordinator.counters[f"refused.{kind}"]
        await asyncio.to_thread(eve.ask, prefix + key, body, attachment)
        assert coordinator.counters[f"refused.{kind}"] == before + 1, kind
    assert handled == []
    (reply,) = await asyncio.to_thread(eve.ask, prefix + "door", good.body, good.attachment)
    assert handled == [PROMPT] and b"done" not in reply.payload.to_bytes()
    await asyncio.to_thread(eve.ask, prefix + "door", good.body, good.attachment)
    assert handled == [PROMPT] and coordinator.counters["refused.replay"] == 1


async def test_node_that_was_started_again_is_learnt_anew(coordinator: Fabric, node: Fabric) -> None:
    identity, ticket = Identity.generate(), coordinator.ticket("r", SECRET).elsewhere()
    keys = set()
    for life in range(3):
        async with await Fabric.connect(identity, ticket) as again:
            keys.add(again.sealing_key)
            await again.serve("again", answer)
            assert await node.request("again", b"%d" % life, 10.0, to=identity.public_key) == b"%d" % life
    assert len(keys) == 3


async def test_node_that_tells_a_wrong_key_is_given_up(
    coordinator: Fabric, node: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in an error, not in a loop."""
    await coordinator.serve("door", answer)
    wrong = SealingKey.generate().public_key
    monkeypatch.setattr(Fabric, "sealing_key", property(lambda _: wrong))
    with pytest.raises(RemoteError, match="another key") as caught:
        await node.request("door", b"x", 10.0, to=coordinator.identity.public_key)
    assert caught.value.kind == "seal" and coordinator.counters["refused.seal"] == 1 + call_module.MAX_STALE


async def test_answer_to_a_sealed_question_must_be_sealed(
    coordinator: Fabric, node: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    await coordinator.serve("door", answer)
    to = coordinator.identity.public_key
    await node.request("door", b"x", 10.0, to=to)
    original = service_module.Service._reply

    async def careless(service, query, header, kind, body, reader):  # type: ignore[no-untyped-def]
        await original(service, query, header, kind, body, b"")

    monkeypatch.setattr(service_module.Service, "_reply", careless)
    with pytest.raises(NetworkError, match="was lost"):
        await node.request("door", b"x", 3.0, to=to)
    assert node.counters["answer_ignored.seal"] >= 1


async def test_too_large_for_a_message_is_said_where_it_is_sent(
    coordinator: Fabric, node: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(call_module, "MAX_BODY_BYTES", 2000)

    async def size(request: Request) -> bytes:
        return bytes(int(request.body))

    await coordinator.serve("size", size)
    to = coordinator.identity.public_key
    assert await node.request("size", b"1000", 10.0, to=to) == bytes(1000)
    with pytest.raises(RemoteError, match="no message may have more than 1000") as caught:
        await node.request("size", b"1001", 10.0, to=to)
    assert (caught.value.kind, caught.value.error_type) == ("refused", "CapacityError")
    with pytest.raises(CapacityError, match="no message may have more than 2000"):
        await node.request("size", bytes(2001), 10.0, to=to)


async def test_hostile_bytes_never_end_a_service(coordinator: Fabric, node: Fabric, eve: Eavesdropper) -> None:
    handled: list[bytes] = []

    async def handle(request: Request) -> bytes:
        handled.append(request.body)
        return request.body

    await coordinator.serve("door", handle)
    to, prefix = coordinator.identity.public_key, namespace_of(coordinator.identity.public_key)
    await node.request("door", b"first", 10.0, to=to)
    good = sealed_for(coordinator, "door", PROMPT, SealingKey.generate(), Identity.generate())

    attachments = st.binary(max_size=400) | st.builds(
        lambda at, with_: good.attachment[:at] + with_ + good.attachment[at + len(with_) :],
        st.integers(0, len(good.attachment) - 1),
        st.binary(min_size=1, max_size=8),
    )

    @settings(max_examples=150)
    @given(
        st.sampled_from(["door", f"node/{coordinator.identity.node_id}/hello"]), st.binary(max_size=200), attachments
    )
    def attack(key: str, body: bytes, attachment: bytes) -> None:
        eve.session.get(prefix + key, payload=body, attachment=attachment, timeout=0.5)

    await asyncio.to_thread(attack)
    assert await node.request("door", b"last", 20.0, to=to) == b"last"
    assert handled == [b"first", b"last"]
    assert coordinator.counters["handler_failed"] == 0
