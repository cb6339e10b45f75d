"""What other machines send: records, tickets, envelopes, rosters, changes, manifests, frames, events of memories."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from fuzz_registry import target, text_of
from fuzz_samples import as_json, packed, plain
from transformers import LlamaConfig

import shoal
from shoal import PROTOCOL_VERSION
from shoal.broadcast.chain import DOMAIN, body_parts, check_chain, find_route, open_manifest
from shoal.broadcast.delta import apply_change, encode_change
from shoal.broadcast.link import HEADER, Kind, Link, digests_of
from shoal.engine.pipeline.stage import Stage
from shoal.errors import ShoalError
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.envelope import check_envelope, read_header, write_envelope
from shoal.fabric.identity import Identity
from shoal.fabric.join import check_join_request, read_join_request
from shoal.fabric.ticket import ROUTER, TICKET, RouterAddress, Ticket
from shoal.memory.signing import SignedEvent, SignedTrial, check_trial, verified
from shoal.protocol.codec import Record, decode, from_json
from shoal.protocol.node import JoinRequest
from shoal.protocol.roster import (
    Bundle,
    Digest,
    Grant,
    NodeRecord,
    RevocationList,
    SignedRecord,
    SyncReply,
    SyncRequest,
)
from shoal.protocol.snapshot import Manifest, SignedManifest
from shoal.protocol.stage import Assignment, Step
from shoal.swarm.grants import GrantBook
from shoal.swarm.roster import Roster
from shoal.swarm.signing import DOMAINS

NOW = 1.8e9
SAMPLES = 40


# Records, as they travel and as they lie on disks.


@cache
def kinds() -> tuple[type[Record], ...]:
    """Every record of the project that can be imported here."""
    for module in pkgutil.walk_packages(shoal.__path__, "shoal."):
        if module.name.split(".")[1] in ("protocol", "coordinator", "memory", "rollout"):
            importlib.import_module(module.name)
    found: list[type[Record]] = []
    open_ = [Record]
    while open_:
        for kind in open_.pop().__subclasses__():
            open_.append(kind)
            if kind.__module__.startswith("shoal.") and kind not in found:
                found.append(kind)
    return tuple(sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"))


def _of_kinds(write: Callable[[Any], bytes]) -> list[bytes]:
    draw = Random(1)
    made = [bytes([number % 256]) + write(plain(kind, draw)) for number, kind in enumerate(kinds()) for _ in range(4)]
    return [one for one in made if len(one) > 1]


@target(lambda: _of_kinds(packed), is_packed=True)
def records(data: bytes) -> None:
    if data:
        record = decode(data[1:], kinds()[data[0] % len(kinds())])
        repr(record)


@target(lambda: _of_kinds(as_json))
def records_of_json(data: bytes) -> None:
    if data:
        from_json(data[1:], kinds()[data[0] % len(kinds())])


# The fabric: tickets, envelopes, addresses.


def _tickets() -> list[bytes]:
    router = RouterAddress(PROTOCOL_VERSION, bytes(32), ("host.test:7447", "[::1]:9"))
    ticket = Ticket(PROTOCOL_VERSION, "run", ("tls/10.0.0.1:7447",), bytes(32), bytes(32), (router,))
    return [ticket.encode().encode(), router.encode().encode()]


@target(_tickets)
def ticket(data: bytes) -> None:
    text = text_of(data)
    for kind in (Ticket, RouterAddress):
        try:
            kind.decode(text)
        except ShoalError:
            continue


def _tickets_inside() -> list[bytes]:
    draw = Random(2)
    return [
        bytes([number]) + packed(plain(kind, draw))
        for number, kind in enumerate((Ticket, RouterAddress))
        for _ in range(SAMPLES)
    ]


@target(_tickets_inside, is_packed=True)
def ticket_inside(data: bytes) -> None:
    """A ticket whose check sum is right: what is inside is hostile."""
    if not data:
        return
    kind, line = ((Ticket, TICKET), (RouterAddress, ROUTER))[data[0] % 2]
    try:
        value = msgspec.msgpack.decode(data[1:], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return
    kind.decode(line.write(value))


@cache
def _identity() -> Identity:
    return Identity.generate()


def _envelopes() -> list[bytes]:
    made = write_envelope(_identity(), "request", "node/x/hello", b"body", now=NOW)
    return [made.attachment]


@target(_envelopes)
def envelope(data: bytes) -> None:
    header = read_header(data)
    check_envelope(header, data, b"body", kinds=("request",), key="node/x/hello")


def _joins() -> list[bytes]:
    draw = Random(3)
    return [b"\0" + packed(plain(JoinRequest, draw)) for _ in range(SAMPLES)]


@target(_joins, is_packed=True)
def join(data: bytes) -> None:
    request = read_join_request(data[1:])
    if not isinstance(request, str):
        check_join_request(request, run="run", secret=bytes(32), now=NOW, seen_nonces=())


@target(lambda: [b"tls/10.0.0.1:7447", b"tcp/[::1]:80", b"tcp/localhost:1"], allowed=(ValueError,))
def endpoint(data: bytes) -> None:
    Endpoint.parse(text_of(data))


GOSSIP = (SyncRequest, SyncReply, Digest, Bundle)


def _signed() -> list[bytes]:
    draw = Random(4)
    return [bytes([n]) + packed(plain(kind, draw)) for n, kind in enumerate(GOSSIP) for _ in range(SAMPLES)]


@target(_signed, is_packed=True)
def gossip(data: bytes) -> None:
    """What nodes tell each other about nodes."""
    if data:
        decode(data[1:], GOSSIP[data[0] % len(GOSSIP)])


SIGNED = (NodeRecord, Grant, RevocationList)


def _node_records() -> list[bytes]:
    draw = Random(10)
    return [bytes([n]) + packed(plain(kind, draw)) for n, kind in enumerate(SIGNED) for _ in range(SAMPLES)]


@target(_node_records, is_packed=True)
def signed_records(data: bytes) -> None:
    """A node's record, a grant or a list of revocations: signed well, by somebody hostile, merged by who hears it."""
    if not data:
        return
    identity = _identity()
    key, body = identity.public_key, data[1:]
    signed = SignedRecord(body, key, identity.sign(DOMAINS[SIGNED[data[0] % 3]] + body))
    grants = GrantBook("run", key)
    Roster("run", grants).merge(signed, NOW)
    grants.merge_grant(signed, NOW)
    grants.merge_revocations(signed, NOW)


# Broadcast: changes, manifests, frames.


def _changes() -> list[bytes]:
    draw = np.random.default_rng(1)
    made = []
    for number, dtype in enumerate((np.uint8, np.uint16, np.uint32, np.uint64)):
        old = draw.integers(0, 200, 512).astype(dtype)
        for share in (0.02, 0.7, 1.0):
            new = np.where(draw.random(512) < share, old + 1, old).astype(dtype)
            made.append(
                bytes([number])
                + encode_change(memoryview(old).cast("B"), memoryview(new).cast("B"), dtype().itemsize).data
            )
    return made


@target(_changes)
def change(data: bytes) -> None:
    if data:
        width = (1, 2, 4, 8)[data[0] % 4]
        apply_change(memoryview(data[1:]), memoryview(bytearray(512 * width)), width)


def _manifests() -> list[bytes]:
    draw = Random(5)
    return [b"\0" + packed(plain(Manifest, draw)) for _ in range(4 * SAMPLES)]


@target(_manifests, is_packed=True)
def manifest(data: bytes) -> None:
    """A manifest of a learner that is hostile: its signature is right."""
    identity = _identity()

    signed = SignedManifest(manifest=data[1:], signer=identity.public_key, signature=identity.sign(DOMAIN + data[1:]))
    published = open_manifest(signed, identity.public_key, "run")
    check_chain([published])
    find_route([published], None)
    for body in (published.manifest.whole, published.manifest.change):
        if body is not None:
            list(body_parts(published.manifest, body))


def _frames() -> list[bytes]:
    sizes = {kind: 0 if kind == Kind.ALIVE else 32 for kind in Kind}
    return [2 * (HEADER.pack(kind, size) + bytes(size)) for kind, size in sizes.items()]


@target(_frames)
def link_frames(data: bytes) -> None:
    """Frames of a direct link, as the other end sends them."""

    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        link = Link(reader, SimpleNamespace(), bytes(32))  # type: ignore[arg-type]
        while not reader.at_eof():
            kind, frame = await link.receive()
            if kind in (Kind.WANT, Kind.DROP):
                digests_of(frame)

    asyncio.run(read())


def _steps() -> list[bytes]:
    draw = Random(6)
    return [b"\x08" + packed(plain(Step, draw)) for _ in range(4 * SAMPLES)]


@cache
def _stage() -> Stage:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    part = Assignment(
        epoch=1, stage=0, num_stages=1, first=0, last=2, lanes=1, lane_slots=2, lane_tokens=32, previous=b"", next=None
    )
    return Stage(config, torch.float32, torch.device("cpu"), part)


@target(_steps, is_packed=True)
def stage_step(data: bytes) -> None:
    """A step of a pipeline that a hostile requester sends to a stage: what to do with its caches, and token ids."""
    if data:
        step = decode(data[1:], Step)
        _stage().compute(step, np.arange(64, dtype=np.int64).tobytes()[: 8 * data[0]])


def _events() -> list[bytes]:
    draw = Random(9)
    kinds = enumerate((SignedEvent, SignedTrial))
    return [bytes([number]) + packed(plain(kind, draw)) for number, kind in kinds for _ in range(SAMPLES)]


@target(_events, is_packed=True)
def memory_event(data: bytes) -> None:
    if not data:
        return
    signed = decode(data[1:], (SignedEvent, SignedTrial)[data[0] % 2])
    if isinstance(signed, SignedEvent):
        verified(signed)
    else:
        check_trial("0" * 64, signed.trial, signed.signer, signed.signature)
