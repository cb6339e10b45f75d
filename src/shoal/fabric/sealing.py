"""Bytes that only one node can read, whoever relays them. Pure.

    shared      = X25519(own sealing key, the other's)                                   once per pair of processes
    root(A → B) = HKDF-SHA256(shared, info = domain + A's public key + B's public key)   once per pair and direction
    key         = BLAKE3 keyed with root(A → B), over the envelope's nonce
    sealed      = ChaCha20-Poly1305(key, nonce 0, plaintext, AAD = the envelope's header)

The nonce is fixed because every message has a key of its own: the envelope's nonce is 128 random bits. The header
names kind, key expression, both parties, times and the request answered, so bytes sealed for one purpose, direction
or sender do not open for another. It is public; `fabric.envelope` signs it together with the sealed bytes.

Not covered: the length is visible. A sealing key is made anew by each process, lives in its memory and is told to
others over its node's signature (`fabric.hello`): whoever reads that memory while the process lives can read what it
recorded of this process's messages, and nothing of earlier ones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shoal.errors import RecordError

DOMAIN = b"shoal sealed 1:"
PUBLIC_BYTES = 32
PRINT_BYTES = 8
OVERHEAD_BYTES = 16
"""How much longer sealed bytes are than what they hide."""

MAX_PAIRS = 4096
"""Nodes whose roots are kept; one that is forgotten costs another X25519."""

NONCE = bytes(12)


class SealError(RecordError):
    """Sealed bytes that do not open (for another node, another purpose, or changed on the way), or a useless key."""


class Pair(NamedTuple):
    """What two processes share."""

    outward: bytes
    """Root of what this process seals for the other."""
    inward: bytes

    def seal(self, plaintext: bytes, nonce: bytes, header: bytes) -> bytes:
        """`plaintext` for the other's eyes; `nonce` must never come twice."""
        return ChaCha20Poly1305(_key(self.outward, nonce)).encrypt(NONCE, plaintext, header)

    def open(self, sealed: bytes, nonce: bytes, header: bytes) -> bytes:
        """What the other sealed.

        Raises:
            SealError: it was not sealed by the other for this header, or was changed.
        """
        try:
            return ChaCha20Poly1305(_key(self.inward, nonce)).decrypt(NONCE, sealed, header)
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag.
            raise SealError("sealed bytes do not open with this node's key.") from None


class SealingKey:
    """A process's X25519 key pair, and the pairs that it is part of."""

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self._pairs: OrderedDict[bytes, Pair] = OrderedDict()
        self._lock = threading.Lock()  # Large bodies are sealed and opened on other threads.
        self.public_key: bytes = private.public_key().public_bytes_raw()
        self.print = key_print(self.public_key)
        """Names the key in headers."""

    def __repr__(self) -> str:
        return f"SealingKey({self.public_key.hex()[:16]})"

    @classmethod
    def generate(cls) -> SealingKey:
        """A fresh key that lives as long as the process."""
        return cls(X25519PrivateKey.generate())

    def pair(self, other: bytes) -> Pair:
        """What this process shares with the one whose public sealing key is `other`.

        Raises:
            SealError: `other` is no usable X25519 key.
        """
        with self._lock:
            if other in self._pairs:
                self._pairs.move_to_end(other)
                return self._pairs[other]
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:  # Also a public key that would make the shared secret zero.
            raise SealError("a node's sealing key cannot be used.") from None
        own = self.public_key
        made = Pair(_root(shared, own + other), _root(shared, other + own))
        with self._lock:
            self._pairs[other] = made
            if len(self._pairs) > MAX_PAIRS:
                self._pairs.popitem(last=False)
        return made


def key_print(public_key: bytes) -> bytes:
    """A short name for a public sealing key."""
    return blake3(public_key).digest(PRINT_BYTES)


def _root(shared: bytes, direction: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=DOMAIN + direction).derive(shared)


def _key(root: bytes, nonce: bytes) -> bytes:
    return blake3(nonce, key=root).digest()
