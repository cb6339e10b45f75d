"""Who a node is: an Ed25519 key pair kept in the user's data directory, and the short id derived from it.

Invariants: a node id depends on the public key alone; a key file is complete or absent (written aside, then linked
into place, so that two processes that start together agree on one key); it is readable by its owner only; a damaged
file is an error to name, never silently replaced, because a node that changes its key is another node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError

from shoal.errors import StorageError
from shoal.protocol.roster import SIGNATURE_BYTES

KEY_FILE = "identity.key"
KEY_HEADER = "shoal identity 1"
PUBLIC_KEY_BYTES = 32
NODE_ID_CHARS = 16
"""64 bits: enough that two of a run's nodes never meet by chance; whoever must be sure compares public keys."""


def data_dir() -> Path:
    """Where Shoal keeps what outlives a run: `$SHOAL_HOME`, else the platform's user data directory."""
    home = os.environ.get("SHOAL_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".local" / "share") / "shoal"


def node_id_of(public_key: bytes) -> str:
    """The short id of the node that owns `public_key` (raw 32 bytes)."""
    return blake3(public_key).hexdigest()[:NODE_ID_CHARS]


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made by the owner of `public_key`; hostile input is just False.

    By libsodium, which takes half of OpenSSL's time (55 against 110 µs) and refuses keys of small order as well.
    """
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + message, public_key)
    except CryptoError:
        return False
    return True


class Identity:
    """A node's key pair."""

    def __init__(self, seed: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self.public_key: bytes = self._private.public_key().public_bytes_raw()
        self.node_id: str = node_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.node_id})"

    @classmethod
    def generate(cls) -> Identity:
        """A fresh identity that lives as long as the process; for local workers, which need no lasting name."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def load_or_create(cls, directory: Path) -> Identity:
        """The identity kept in `directory`, made on first use.

        Raises:
            StorageError: the directory cannot be used, or the key file is damaged or readable by others.
        """
        path = directory / KEY_FILE
        try:
            if not path.exists():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _write_once(path, cls.generate()._to_text())
            if path.stat().st_mode & 0o077:
                raise StorageError(f"the identity file {path} can be read by other users.", f"Run: chmod 600 {path}")
            text = path.read_text("ascii")
        except OSError as error:
            raise StorageError(
                f"the identity file {path} cannot be read or made: {error.strerror}.",
                "Make the directory writable, or set SHOAL_HOME to one that is.",
            ) from error
        except UnicodeDecodeError:
            text = ""
        return cls._from_text(text, path)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `message`."""
        return self._private.sign(message)

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """For `fabric.tls`, which signs this node's certificate with it; goes nowhere else."""
        return self._private

    def _to_text(self) -> str:
        return f"{KEY_HEADER}\n{self._seed.hex()}\n{self.public_key.hex()}\n"

    @classmethod
    def _from_text(cls, text: str, path: Path) -> Identity:
        try:
            header, seed, public = text.splitlines()
            identity = cls(bytes.fromhex(seed))
            intact = header == KEY_HEADER and identity.public_key == bytes.fromhex(public)
        except ValueError:
            intact = False
        if not intact:
            raise StorageError(
                f"the identity file {path} is damaged.",
                "Restore it from a backup, or delete it to become a new node with a new id.",
            )
        return identity


def _write_once(path: Path, text: str) -> None:
    """Write `path` whole unless it exists; of several writers one wins and the others keep its file."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        os.unlink(aside)
