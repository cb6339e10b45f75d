"""What a published model version is: tensors in content-addressed chunks, hash-chained and signed.

Invariant: the signature covers the MessagePack bytes of the manifest, which name every chunk's hash, every tensor's
hash and the parent's hash; so a node that trusts the learner's public key trusts nothing else about a snapshot.
Issue of trust: this room only describes; `broadcast` hashes, signs and verifies.
"""

from __future__ import annotations

from typing import Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record

MAX_TENSORS = 100_000
MAX_TENSOR_BYTES = 1 << 40
MAX_CHUNK_BYTES = 16 * 2**20
HASH_BYTES = 32

DType = Literal["F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
"""As safetensors names them."""

DTYPE_BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

SnapshotKind = Literal["anchor"]
"""`anchor`: all tensors whole. Deltas and adapters join here when the codec does."""


class TensorEntry(Record, frozen=True):
    """One tensor: its layout and the BLAKE3 hashes (32 bytes each) of its chunks and of all its bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunk_bytes: int
    """Every chunk but the last has this many bytes."""
    chunks: tuple[bytes, ...]
    hash: bytes

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size

    def check(self) -> None:
        if not self.name or len(self.name) > 512:
            raise RecordError("a tensor's name is empty or too long.")
        if len(self.shape) > 8 or any(dim < 0 or dim > MAX_TENSOR_BYTES for dim in self.shape):
            raise RecordError(f"tensor {self.name} has an impossible shape {self.shape}.")
        if self.num_bytes > MAX_TENSOR_BYTES:
            raise RecordError(f"tensor {self.name} claims {self.num_bytes} bytes.")
        if not 1 <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise RecordError(f"tensor {self.name} has chunks of {self.chunk_bytes} bytes.")
        if len(self.chunks) != -(-self.num_bytes // self.chunk_bytes):
            raise RecordError(f"tensor {self.name} lists {len(self.chunks)} chunks, which do not cover its bytes.")
        if len(self.hash) != HASH_BYTES or any(len(c) != HASH_BYTES for c in self.chunks):
            raise RecordError(f"tensor {self.name} has a hash that is not {HASH_BYTES} bytes long.")


class Manifest(Record, frozen=True):
    """One published version of one model of one run."""

    run: str
    model: str
    """`policy`; later also drafters and world models."""
    version: int
    kind: SnapshotKind
    parent: bytes
    """Hash of the previous manifest of this model, or empty for the first."""
    tensors: tuple[TensorEntry, ...]

    def check(self) -> None:
        if not self.run or len(self.run) > 256 or not self.model or len(self.model) > 256:
            raise RecordError("a manifest's run or model is empty or too long.")
        if self.version < 0 or len(self.parent) not in (0, HASH_BYTES):
            raise RecordError("a manifest has a negative version or a parent that is no hash.")
        if len(self.tensors) > MAX_TENSORS:
            raise RecordError(f"a manifest lists more than {MAX_TENSORS} tensors.")
        names = set()
        for tensor in self.tensors:
            tensor.check()
            names.add(tensor.name)
        if len(names) != len(self.tensors):
            raise RecordError("a manifest names a tensor twice.")


class SignedManifest(Record, frozen=True):
    """A manifest's exact bytes and the learner's Ed25519 signature over them."""

    manifest: bytes
    signer: bytes
    """Raw 32-byte public key."""
    signature: bytes

    def check(self) -> None:
        if len(self.signer) != 32 or len(self.signature) != 64:
            raise RecordError("a signed manifest's key or signature has the wrong length.")
