"""Who may look: a key once, then a cookie; and what may change anything.

A visitor gives a key, whose hash is known here (`serving.keys`), and gets a cookie: who, since when, a nonce, and a MAC
over them. The MAC's secret is kept on this disk, so a session outlives a restart; it ends after `LIFE_S`, and when the
server starts without its key. Where no key is asked for, everybody has a cookie of nobody, for the sake of the token
below.

Invariants: what changes anything carries a token that is made from the cookie and stands in the page alone, so no
other site can send it; without keys only names of this machine are answered (`Host`), so no other site's name can be
pointed here to read; a cookie is never readable by scripts nor sent along from other sites.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from shoal.errors import StorageError
from shoal.serving.console.html import PREFIX
from shoal.serving.keys import Keys
from shoal.serving.origin import is_of_this_machine, name_of, same_origin
from shoal.swarm.keyfile import read_private, write_private

COOKIE = "shoal_console"
LIFE_S = 12 * 3600.0
SECRET_BYTES = 32
NOBODY = "-"
_COOKIE = re.compile(r"([0-9a-f]{64}|-)\.(\d{1,12})\.([0-9a-f]{16})\.([0-9a-f]{64})")


@dataclass(frozen=True)
class Visitor:
    """Somebody with a valid cookie."""

    cookie: str
    name: str
    """Whose key it is; empty where none is asked for."""


class Door:
    """Checks keys, cookies and tokens.

    Args:
        secret: makes cookies that nobody else can make.
        host: where the server listens: a name that is answered without keys.
    """

    def __init__(self, keys: Keys, secret: bytes, host: str = "127.0.0.1") -> None:
        assert len(secret) >= SECRET_BYTES
        self._keys, self._secret, self._host = keys, secret, host

    @property
    def asks(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys.names)

    def enter(self, key: str, now: float) -> str | None:
        """The cookie for a key; None where it is not known."""
        name = self._keys.owner(key.strip())
        if name is None:
            return None
        owner = next(hashed for hashed, known in self._keys.names.items() if known == name)
        return self._cookie(owner.hex(), now)

    def visitor(self, request: Request, now: float) -> Visitor | None:
        """Who asks, by the cookie; None for somebody without a valid one."""
        found = _COOKIE.fullmatch(request.cookies.get(COOKIE, ""))
        if found is None:
            return None
        who, since, nonce, mac = found.groups()
        if not hmac.compare_digest(mac, self._mac("cookie", f"{who}.{since}.{nonce}")):
            return None
        if not 0 <= now - int(since) < LIFE_S:
            return None
        if not self.asks:
            return Visitor(found[0], "")
        name = self._keys.names.get(bytes.fromhex(who)) if who != NOBODY else None
        return Visitor(found[0], name) if name is not None else None

    def nobody(self, now: float) -> Visitor:
        """A visitor where no key is asked for."""
        assert not self.asks
        return Visitor(self._cookie(NOBODY, now), "")

    def token(self, visitor: Visitor) -> str:
        """What a page of this visitor sends along with what changes anything."""
        return self._mac("token", visitor.cookie)

    def may_change(self, request: Request, visitor: Visitor, token: str) -> bool:
        """Whether a request that changes something comes from a page of this visitor."""
        return same_origin(request.headers) and hmac.compare_digest(token.encode(), self.token(visitor).encode())

    def answers(self, request: Request) -> bool:
        """Whether the name by which this server was asked for is one to be answered."""
        if self.asks:
            return True
        name = name_of(request.headers)
        return name == self._host or is_of_this_machine(name)

    def _cookie(self, who: str, now: float) -> str:
        said = f"{who}.{int(now)}.{secrets.token_hex(8)}"
        return f"{said}.{self._mac('cookie', said)}"

    def _mac(self, what: str, said: str) -> str:
        return hmac.new(self._secret, f"{what}:{said}".encode(), hashlib.sha256).hexdigest()


def give(response: Response, cookie: str) -> None:
    """Set the cookie; it lives as long as the session."""
    response.set_cookie(COOKIE, cookie, max_age=int(LIFE_S), path=PREFIX, httponly=True, samesite="strict")


def kept_secret(path: Path) -> bytes:
    """The secret in a file, made on first use.

    Raises:
        StorageError: it cannot be read or made, or others can read it.
    """
    found = read_private(path)
    if found is None:
        found = secrets.token_bytes(SECRET_BYTES)
        write_private(path, found)
    if len(found) < SECRET_BYTES:
        raise StorageError(f"the file {path} is damaged.", "Delete it: everybody then gives a key once more.")
    return found


def now() -> float:
    """Unix seconds."""
    return time.time()
