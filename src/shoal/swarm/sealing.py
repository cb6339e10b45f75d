"""Bytes that only one node can read, whoever relays them.

    shared  = X25519(ephemeral key, recipient's sealing key)
    key     = HKDF-SHA256(shared, salt = ephemeral public + recipient public, info = domain + context)
    sealed  = ephemeral public (32) + ChaCha20-Poly1305(key, nonce 0, plaintext, AAD = domain + recipient + context)

The nonce is fixed because every message has a key of its own. `context` says what the bytes are for (the message kind
and what it belongs to): bytes sealed for one purpose do not open for another.

Not covered: sealing says nothing about the sender; the envelope that carries the bytes is signed. Length is visible.
Whoever obtains a sealing key can read what was sealed to it: the key lives in memory and dies with the process, and
a node that starts again announces a new one.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shoal.errors import RecordError

DOMAIN = b"shoal sealed 1:"
PUBLIC_BYTES = 32
OVERHEAD_BYTES = PUBLIC_BYTES + 16
"""How much longer sealed bytes are than what they hide."""

MAX_CONTEXT_BYTES = 1024
NONCE = bytes(12)


class SealError(RecordError):
    """Sealed bytes that do not open: made for another node, another purpose, or changed on the way."""


class SealingKey:
    """A node's X25519 key pair. `public_key` goes into its record."""

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public_key: bytes = private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SealingKey({self.public_key.hex()[:16]})"

    @classmethod
    def generate(cls) -> SealingKey:
        """A fresh key that lives as long as the process."""
        return cls(X25519PrivateKey.generate())

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """The plaintext of bytes sealed to this key for this purpose.

        Raises:
            SealError: they were not, or were changed.
        """
        if len(sealed) < OVERHEAD_BYTES:
            raise SealError(f"{len(sealed)} bytes are too few to be sealed.")
        ephemeral = sealed[:PUBLIC_BYTES]
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
            cipher = ChaCha20Poly1305(_derive(shared, ephemeral, self.public_key, context))
            return cipher.decrypt(NONCE, sealed[PUBLIC_BYTES:], _bound(self.public_key, context))
        except (InvalidTag, ValueError):  # ValueError: a public key that would make the shared secret zero.
            raise SealError("sealed bytes do not open with this node's key.") from None


def seal(recipient: bytes, plaintext: bytes, context: bytes) -> bytes:
    """Seal to the node whose record carries `recipient` as its sealing key.

    Raises:
        SealError: `recipient` is no usable X25519 key.
    """
    assert len(context) <= MAX_CONTEXT_BYTES
    private = X25519PrivateKey.generate()
    ephemeral = private.public_key().public_bytes_raw()
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(recipient))
    except ValueError:
        raise SealError("a node's sealing key cannot be used.") from None
    cipher = ChaCha20Poly1305(_derive(shared, ephemeral, recipient, context))
    return ephemeral + cipher.encrypt(NONCE, plaintext, _bound(recipient, context))


def _derive(shared: bytes, ephemeral: bytes, recipient: bytes, context: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=ephemeral + recipient, info=DOMAIN + context).derive(shared)


def _bound(recipient: bytes, context: bytes) -> bytes:
    return DOMAIN + recipient + context
