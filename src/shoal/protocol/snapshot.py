"""What a published model version is: tensors in content-addressed chunks, hash-chained and signed.

A version's tensors can be had in two ways, and a manifest offers one or both: *whole*, and as the *change* against
its parent. A version with its whole bytes is an anchor: whoever holds nothing begins there.

    manifest of version 7 ── tensors: name, dtype, shape, hash of the whole tensor
                          ├─ whole:  every tensor's bytes                  ┐ each one stream, cut into chunks named
                          └─ change: what differs from version 6, encoded  ┘ by their hashes

Invariant: the signature covers the MessagePack bytes of the manifest, which name every chunk's hash, every tensor's
hash and the parent's hash; so a node that trusts the learner's public key trusts nothing else about a snapshot.
Issue of trust: this room only describes; `broadcast` hashes, encodes, signs and verifies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record

MAX_TENSORS = 100_000
MAX_TENSOR_BYTES = 1 << 40
MAX_CHUNK_BYTES = 16 * 2**20
HASH_BYTES = 32

CHANGE_OVERHEAD = 64
"""An encoded change is never longer than its tensor and 1/64 of it, and this many bytes."""

DType = Literal["F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
"""As safetensors names them."""

DTYPE_BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TensorEntry(Record, frozen=True):
    """One tensor: its layout and the BLAKE3 hash (32 bytes) of all its bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    hash: bytes

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size

    @property
    def layout(self) -> tuple[str, DType, tuple[int, ...]]:
        """All but the content."""
        return self.name, self.dtype, self.shape

    def check(self) -> None:
        if not self.name or len(self.name) > 512:
            raise RecordError("a tensor's name is empty or too long.")
        if len(self.shape) > 8 or any(dim < 0 or dim > MAX_TENSOR_BYTES for dim in self.shape):
            raise RecordError(f"tensor {self.name} has an impossible shape {self.shape}.")
        if self.num_bytes > MAX_TENSOR_BYTES:
            raise RecordError(f"tensor {self.name} claims {self.num_bytes} bytes.")
        if len(self.hash) != HASH_BYTES:
            raise RecordError(f"tensor {self.name} has a hash that is not {HASH_BYTES} bytes long.")


class Body(Record, frozen=True):
    """A stream of bytes, one part for each tensor of the manifest in its order, cut into chunks."""

    sizes: tuple[int, ...]
    """Bytes of each tensor's part; in a change, 0 for a tensor that is as in the parent."""
    chunk_bytes: int
    """Every chunk but the last has this many bytes."""
    chunks: tuple[bytes, ...]
    """BLAKE3 hash of each chunk."""

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    def chunk_sizes(self) -> Iterator[tuple[bytes, int]]:
        """Each chunk's hash and size, in order."""
        left = self.num_bytes
        for digest in self.chunks:
            yield digest, min(left, self.chunk_bytes)
            left -= self.chunk_bytes

    def check(self) -> None:
        if any(not 0 <= size <= 2 * MAX_TENSOR_BYTES for size in self.sizes):
            raise RecordError("a snapshot's part has an impossible size.")
        if not 1 <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise RecordError(f"a snapshot has chunks of {self.chunk_bytes} bytes.")
        if len(self.chunks) != -(-self.num_bytes // self.chunk_bytes):
            raise RecordError(f"a snapshot lists {len(self.chunks)} chunks, which do not cover its bytes.")
        if any(len(chunk) != HASH_BYTES for chunk in self.chunks):
            raise RecordError(f"a chunk has a hash that is not {HASH_BYTES} bytes long.")


class Manifest(Record, frozen=True):
    """One published version of one model of one run."""

    run: str
    model: str
    """`policy`; drafters, world models and adapters are chains of their own."""
    version: int
    parent: bytes
    """Hash of the previous manifest of this model, or empty for the first."""
    tensors: tuple[TensorEntry, ...]
    whole: Body | None = None
    change: Body | None = None

    @property
    def is_anchor(self) -> bool:
        """Whether it can be had without its parent."""
        return self.whole is not None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The one or two ways to have it."""
        return tuple(body for body in (self.whole, self.change) if body is not None)

    def check(self) -> None:
        if not self.run or len(self.run) > 256 or not self.model or len(self.model) > 256:
            raise RecordError("a manifest's run or model is empty or too long.")
        if self.version < 0 or len(self.parent) not in (0, HASH_BYTES):
            raise RecordError("a manifest has a negative version or a parent that is no hash.")
        if len(self.tensors) > MAX_TENSORS:
            raise RecordError(f"a manifest lists more than {MAX_TENSORS} tensors.")
        for tensor in self.tensors:
            tensor.check()
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise RecordError("a manifest names a tensor twice.")
        if not self.bodies:
            raise RecordError("a manifest says nowhere how its tensors can be had.")
        for body in self.bodies:
            body.check()
            if len(body.sizes) != len(self.tensors):
                raise RecordError("a manifest's parts are not as many as its tensors.")
        if self.whole is not None and self.whole.sizes != tuple(tensor.num_bytes for tensor in self.tensors):
            raise RecordError("a manifest's parts do not have the sizes of its tensors.")
        if self.change is not None:
            self._check_change(self.change)

    def _check_change(self, change: Body) -> None:
        if not self.parent:
            raise RecordError("a manifest gives a change, but no parent.")
        for tensor, size in zip(self.tensors, change.sizes, strict=True):
            if size > tensor.num_bytes + tensor.num_bytes // 64 + CHANGE_OVERHEAD:
                raise RecordError(f"the change of tensor {tensor.name} is longer than the tensor.")


class SignedManifest(Record, frozen=True):
    """A manifest's exact bytes and the learner's Ed25519 signature over them."""

    manifest: bytes
    signer: bytes
    """Raw 32-byte public key."""
    signature: bytes

    def check(self) -> None:
        if len(self.signer) != 32 or len(self.signature) != 64:
            raise RecordError("a signed manifest's key or signature has the wrong length.")


class ChainPart(Record, frozen=True):
    """Manifests that follow each other, newest first: what a node needs to reach the first of them."""

    manifests: tuple[SignedManifest, ...]

    def check(self) -> None:
        for signed in self.manifests:
            signed.check()


MAX_PEERS = 4096


class PeerRecord(Record, frozen=True):
    """What a node says of itself to whoever it fetches from, so that others can be sent to it for chunks."""

    host: str = ""
    """Where it listens for links; empty if nobody can connect to it."""
    port: int = 0
    up_bytes_per_s: float = 0.0
    """What it can send; 0 if it does not know."""
    down_bytes_per_s: float = 0.0
    """What it can take; 0 if it does not know."""
    whole: int = -1
    """The version whose whole bytes it has, and all changes since; -1: none."""

    def check(self) -> None:
        if self.whole < -1:
            raise RecordError("a peer claims to have a version that cannot be.")
        if len(self.host) > 253 or not 0 <= self.port <= 65535 or bool(self.host) != bool(self.port):
            raise RecordError("a peer's address is none.")
        if not (0 <= self.up_bytes_per_s <= 1e12 and 0 <= self.down_bytes_per_s <= 1e12):
            raise RecordError("a peer claims an impossible rate.")


class Peer(Record, frozen=True):
    """A node that fetches a version, or has it."""

    public_key: bytes
    record: PeerRecord

    def check(self) -> None:
        if len(self.public_key) != 32:
            raise RecordError("a peer's key has the wrong length.")
        self.record.check()


class PeerList(Record, frozen=True):
    """Those among whom the chunks of one version are passed on; the same list for everyone who asks for it."""

    source: Peer
    peers: tuple[Peer, ...]
    holders: tuple[Peer, ...] = ()
    """Some who have a whole version, for those who come late; not the same for everyone."""

    def check(self) -> None:
        if len(self.peers) > MAX_PEERS or len(self.holders) > MAX_PEERS:
            raise RecordError(f"a list names more than {MAX_PEERS} peers.")
        for peer in (self.source, *self.peers, *self.holders):
            peer.check()
        if len({peer.public_key for peer in self.peers}) != len(self.peers):
            raise RecordError("a list names a peer twice.")
