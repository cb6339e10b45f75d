"""What a pipeline's nodes say to each other: who can do what, who does which layers, and the steps themselves.

    StageSpec        requester → stage   in the answer to its join request: the model, and where links are taken
    StageOffer       stage → requester   what it can hold and how fast it is          `pipeline/offer`
    TensorRequest    stage → requester   a piece of a checkpoint's tensor             `pipeline/tensor`
    DelayRequest     requester → stage   how far is it to these others?               `node/ID/delays`
    Assignment       requester → stage   its layers, and who comes next               `node/ID/assign`
    PrepareRequest   requester → stage   fetch your layers of these weights           `node/ID/prepare`
    Step             around the ring     ids or hidden states of one batch, as frames on direct links

A *lane* is one batch with its own rows of the cache; each has one step under way, or a few, each drafted on the guess
that the one before it comes out as drafted. An *epoch* is one assignment of layers: caches begin empty in each, and
steps of an earlier one mean nothing. All stages of an epoch have weights of the same version.

Invariants: a message's size is bounded by what its header says and that by `MAX_STEP_BYTES`; frames are at most
`PIECE_BYTES`, so that one fits a connection's first window on a long link. Pure; bytes are bounded here and checked
against the model by who computes with them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record

PIECE_BYTES = 32 * 2**10
"""Payload of one frame: more costs a second round trip where a connection's window starts small."""

MAX_STEP_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_CONFIG_BYTES = 2**20
MAX_TENSOR_PIECE_BYTES = 8 * 2**20
MAX_TENSORS = 2**20
MAX_LAYERS = 10_000
MAX_ROWS = 4096
MAX_OPS = 4 * MAX_ROWS
MAX_LANES = 64
MAX_STAGES = 64
MAX_POSITIONS = 2**24
MAX_IN_FLIGHT = 8
"""Steps of one lane under way."""

MAX_NODES = 2**16
"""Drafts in the trees of one step."""

MAX_DEPTHS = 8
MAX_VOIDS = 64

PREFIX = struct.Struct(">II")
"""Lengths of a step's header and of its tensor, before both."""

StageDType = Literal["bf16", "fp32"]


class LinkAddress(Record, frozen=True):
    """Where a node takes direct links."""

    host: str
    port: int
    public_key: bytes

    def check(self) -> None:
        if not (0 < len(self.host) <= 255 and 0 < self.port < 2**16 and len(self.public_key) == 32):
            raise RecordError("a link's address is malformed.")


class StageSpec(Record, frozen=True):
    """The model that is served, as a stage needs to know it."""

    model: str
    """For people."""
    config: bytes
    """Its `config.json`."""
    dtype: StageDType
    cache_tokens: int
    """Tokens that all lanes have room for, what they keep aside included: what memory a layer takes follows."""
    home: LinkAddress
    """Where the requester takes links."""

    def check(self) -> None:
        if len(self.model) > 512 or not 0 < len(self.config) <= MAX_CONFIG_BYTES or self.cache_tokens < 1:
            raise RecordError("a stage's specification has a field of a wrong length.")
        self.home.check()


class StageOffer(Record, frozen=True):
    """What a node says it can do."""

    address: LinkAddress
    max_layers: int
    seconds_per_layer: float
    """Measured: one layer, one row."""
    delay_s: float = 0.0
    """One way to the requester, measured."""

    def check(self) -> None:
        self.address.check()
        if not 0 < self.max_layers <= MAX_LAYERS:
            raise RecordError("a stage offers an impossible number of layers.")
        for value in (self.seconds_per_layer, self.delay_s):
            if not (math.isfinite(value) and 0 <= value <= 3600):
                raise RecordError("a stage offers an impossible time.")


class DelayRequest(Record, frozen=True):
    """Where other stages take links: how far is it?"""

    addresses: tuple[LinkAddress, ...]

    def check(self) -> None:
        if len(self.addresses) > MAX_STAGES:
            raise RecordError(f"delays to more than {MAX_STAGES} stages are asked for.")
        for address in self.addresses:
            address.check()


class DelayReply(Record, frozen=True):
    """One way, in seconds, in the order of the addresses; negative where there is no direct way."""

    delays_s: tuple[float, ...]

    def check(self) -> None:
        if len(self.delays_s) > MAX_STAGES or any(not -1 <= delay <= 3600 for delay in self.delays_s):
            raise RecordError("delays are told that cannot be.")


class TensorRequest(Record, frozen=True):
    """Bytes of one tensor, from an offset on."""

    name: str
    offset: int
    version: int = 0
    """Of the weights; 0: those that the server began with."""

    def check(self) -> None:
        if not 0 < len(self.name) <= 512 or not 0 <= self.offset < 2**48 or not 0 <= self.version < 2**48:
            raise RecordError("a tensor is asked for wrongly.")


class TensorPiece(Record, frozen=True):
    """Bytes of a tensor, from the offset that was asked for."""

    dtype: str
    shape: tuple[int, ...]
    total: int
    data: bytes

    def check(self) -> None:
        if len(self.dtype) > 8 or len(self.shape) > 8 or not 0 <= self.total < 2**48:
            raise RecordError("a tensor's piece is malformed.")
        if len(self.data) > MAX_TENSOR_PIECE_BYTES or any(not 0 <= n < 2**48 for n in self.shape):
            raise RecordError("a tensor's piece is malformed.")


class Assignment(Record, frozen=True):
    """One stage's part in an epoch."""

    epoch: int
    stage: int
    """Its place in the ring."""
    num_stages: int
    first: int
    last: int
    """Layers `first` … `last` - 1."""
    lanes: int
    lane_slots: int
    lane_tokens: int
    """Rows, and tokens over all rows, of each lane's cache."""
    previous: bytes
    """Public key of the stage before; empty for the first."""
    next: LinkAddress | None
    """Who takes what this stage gives; none: the requester."""
    prefix_tokens: int = 0
    """Tokens of finished sequences that each lane keeps aside."""
    version: int = 0
    """Of the weights: all stages of an epoch have the same."""

    def check(self) -> None:
        if not 0 <= self.version < 2**48:
            raise RecordError("an assignment's version is out of range.")
        if not (self.epoch >= 1 and 0 <= self.stage < self.num_stages <= MAX_STAGES):
            raise RecordError("an assignment's place is out of range.")
        if not 0 <= self.first < self.last <= MAX_LAYERS or not 1 <= self.lanes <= MAX_LANES:
            raise RecordError("an assignment's layers or lanes are out of range.")
        if not (1 <= self.lane_slots <= MAX_ROWS and 1 <= self.lane_tokens <= 2**40 >= self.prefix_tokens >= 0):
            raise RecordError("an assignment's cache is out of range.")
        if len(self.previous) not in (0, 32):
            raise RecordError("an assignment names a key of a wrong length.")
        if self.next is not None:
            self.next.check()


class PrepareRequest(Record, frozen=True):
    """Other weights will soon be served: fetch those of your layers while you go on with the present ones."""

    version: int

    def check(self) -> None:
        if not 0 <= self.version < 2**48:
            raise RecordError("weights of an impossible version are announced.")


class Assigned(Record, frozen=True):
    """The stage is ready; what that took."""

    epoch: int
    loaded_tensors: int = 0
    seconds: float = 0.0


class CacheOp(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a lane's cache does before the step: `KVCache`'s methods of the same names, with their arguments; and

    move            in row a the entry of position b becomes that of position c
    keep            the first c positions of row a are kept aside, under the number b
    restore, drop   the first c of what is kept under b become row a's; what is kept under b goes
    """

    kind: Literal["reserve", "copy", "clear", "move", "keep", "restore", "drop"]
    a: int
    b: int = 0
    c: int = 0


class Step(Record, frozen=True):
    """A step's header; its tensor follows: int32 ids for the first stage, hidden states in the model's type behind, and
    after them those that entered each of the `depths` so far."""

    epoch: int
    lane: int
    number: int
    """Of the lane's step; a result is that of the step with this number."""
    stage: int
    """Who is to take it; `num_stages` is the requester."""
    width: int
    """New tokens of each row."""
    start: tuple[int, ...]
    """Each row's first new position."""
    first_slot: int
    at: tuple[int, ...] = ()
    """Which of each row's new tokens is asked about; empty: all."""
    parents: tuple[tuple[int, ...], ...] = ()
    """Where a row's new tokens are a tree: of each but the first, which one it follows, as drafts are counted (-1: the
    first token; -2: padding); empty: each follows the one before it."""
    depths: tuple[int, ...] = ()
    """Layers whose incoming hidden states of all new tokens are sent back as well, ascending."""
    voids: tuple[int, ...] = ()
    """Steps of this lane, by number, that nobody waits for any more: where one was not computed yet, it is dropped."""
    ops: tuple[CacheOp, ...] = ()
    busy_s: tuple[float, ...] = ()
    """What each stage so far took to compute."""
    failure: str = ""
    """Why a stage could not compute it; to the requester, without a tensor."""

    def check(self) -> None:
        rows = len(self.start)
        if not (self.epoch >= 1 and 0 <= self.lane < MAX_LANES and self.number >= 0):
            raise RecordError("a step's epoch, lane or number is out of range.")
        if not (0 <= self.stage <= MAX_STAGES and 1 <= rows <= MAX_ROWS and 1 <= self.width <= MAX_POSITIONS):
            raise RecordError("a step's shape is out of range.")
        if len(self.at) not in (0, rows) or any(not 0 <= at < self.width for at in self.at):
            raise RecordError("a step asks about tokens that it does not have.")
        if any(not 0 <= p <= MAX_POSITIONS for p in self.start) or not 0 <= self.first_slot < MAX_ROWS:
            raise RecordError("a step's positions are out of range.")
        if len(self.parents) not in (0, rows) or sum(map(len, self.parents)) > MAX_NODES:
            raise RecordError("a step's trees do not fit its rows.")
        for above in self.parents:
            if len(above) != self.width - 1 or any(not -2 <= p < node for node, p in enumerate(above)):
                raise RecordError("a step's tree is none.")
        if len(self.depths) > MAX_DEPTHS or any(not 0 <= d < MAX_LAYERS for d in self.depths):
            raise RecordError("a step asks for hidden states that are not there.")
        if list(self.depths) != sorted(self.depths) or len(self.voids) > MAX_VOIDS:
            raise RecordError("a step's depths or voids are malformed.")
        if len(self.ops) > MAX_OPS or any(min(op.a, op.b, op.c) < 0 for op in self.ops):
            raise RecordError("a step's cache operations are out of range.")
        if len(self.busy_s) > MAX_STAGES or len(self.failure) > 1000:
            raise RecordError("a step tells too much.")


def frames(header: bytes, tensor: bytes | memoryview) -> Iterator[bytes]:
    """A step as frames of at most `PIECE_BYTES`."""
    whole = PREFIX.pack(len(header), len(tensor)) + header + bytes(tensor)
    for at in range(0, len(whole), PIECE_BYTES):
        yield whole[at : at + PIECE_BYTES]


class Reassembly:
    """Frames of one link back into steps: header and tensor."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._needed = 0
        self._header_bytes = 0

    def add(self, frame: bytes) -> tuple[bytes, bytes] | None:
        """Take the next frame; gives header and tensor once a step is whole.

        Raises:
            RecordError: it does not begin or end as a step does, or promises too much.
        """
        if not self._needed:
            if len(frame) < PREFIX.size:
                raise RecordError("a step's first frame is too short.")
            self._header_bytes, tensor_bytes = PREFIX.unpack_from(frame)
            if self._header_bytes > MAX_HEADER_BYTES or tensor_bytes > MAX_STEP_BYTES:
                raise RecordError(f"a step of {self._header_bytes + tensor_bytes} bytes is announced.")
            self._needed = PREFIX.size + self._header_bytes + tensor_bytes
        self._data += frame
        if len(self._data) > self._needed:
            raise RecordError("a step has more bytes than it announced.")
        if len(self._data) < self._needed:
            return None
        data, at = bytes(self._data), PREFIX.size + self._header_bytes
        self._data.clear()
        self._needed = 0
        return data[PREFIX.size : at], data[at:]
