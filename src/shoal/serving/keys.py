"""API keys: who may ask.

A key is 256 random bits, so one SHA-256 is hash enough: there is nothing to guess. Keys are shown once, when they are
made; on disk and in memory there are only hashes.

Invariant: a comparison's time does not depend on how much of a key is right.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ConfigError
from shoal.swarm.keyfile import read_private, write_private

PREFIX = "sk-shoal-"
MAX_KEY_CHARS = 256
_LINE = re.compile(r"([0-9a-f]{64}) ([A-Za-z0-9._-]{1,64})")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class Keys:
    """Hashes and whose they are; empty lets everybody in."""

    names: dict[bytes, str]

    def owner(self, key: str) -> str | None:
        """Whose key this is."""
        if len(key) > MAX_KEY_CHARS:
            return None
        asked = digest(key)
        found = [name for known, name in self.names.items() if hmac.compare_digest(known, asked)]
        return found[0] if found else None


def load(path: Path) -> Keys:
    """The keys of a file that `add` writes; none where there is no file.

    Raises:
        ConfigError: a line is not a key's hash and name.
        StorageError: it cannot be read, or other users can read it.
    """
    names: dict[bytes, str] = {}
    for number, line in enumerate((read_private(path) or b"").decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ConfigError(f"line {number} of {path} is no key.", "Make keys with shoal serve --new-key NAME.")
        names[bytes.fromhex(found[1])] = found[2]
    return Keys(names)


def add(path: Path, name: str) -> str:
    """Make a key for `name`, keep its hash, and give the key: the only time that it is seen."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"'{name}' is no name for a key.", "Use up to 64 letters, digits, dots and dashes.")
    names = dict(load(path).names)
    key = PREFIX + secrets.token_urlsafe(32)
    names[digest(key)] = name
    write_private(path, "".join(f"{hashed.hex()} {owner}\n" for hashed, owner in names.items()).encode())
    return key
