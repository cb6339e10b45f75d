"""Getting what is at a URL, for a model that may have been told the URL by a stranger's page.

Invariants: only public addresses are connected to, unless the user has allowed the host by name; it is the address that
was looked at which is connected to, and every redirect is looked at like the first URL (so neither a name that changes
its mind nor a redirect leads inside); size, time and redirects are bounded; no cookie, key or proxy setting goes along.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx

from shoal.agents.tools.function import ToolError

MAX_BYTES = 8 * 2**20
MAX_REDIRECTS = 5
TIMEOUT_S = 30.0
AGENT = "shoal-agent"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Fetched:
    """What came back."""

    url: str
    """Where it was found in the end."""
    kind: str
    """Its media type, without parameters."""
    body: bytes
    encoding: str

    @property
    def text(self) -> str:
        return self.body.decode(self.encoding, "replace")


async def fetch(url: str, *, allow: Sequence[str] = (), max_bytes: int = MAX_BYTES) -> Fetched:
    """The document at `url`.

    Args:
        allow: hosts (`HOST` or `HOST:PORT`) that may be asked although their addresses are not public.

    Raises:
        ToolError: the URL may not be asked, nobody answers, or the answer is an error or too large.
    """
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S, headers={"User-Agent": AGENT}) as client,
        ):
            for _ in range(MAX_REDIRECTS + 1):
                found = await _once(client, url, allow, max_bytes)
                if isinstance(found, Fetched):
                    return found
                url = found
    except TimeoutError:
        raise ToolError(f"{url[:200]} gave no answer within {TIMEOUT_S:g} s", retryable=True) from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise ToolError(f"{url[:200]}: {type(error).__name__}: {error}", retryable=True) from None
    raise ToolError(f"{url[:200]}: more than {MAX_REDIRECTS} redirects")


async def _once(client: httpx.AsyncClient, url: str, allow: Sequence[str], max_bytes: int) -> Fetched | str:
    """One request: what came back, or where to ask instead."""
    asked = httpx.URL(url)
    address = await public_address(asked, allow)
    request = client.build_request(
        "GET",
        asked.copy_with(host=address),
        headers={"Host": asked.netloc.decode("ascii")},
        extensions={"sni_hostname": asked.host},
    )
    response = await client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return urljoin(url, response.headers["location"])
        if response.status_code != 200:
            raise ToolError(
                f"{url[:200]} answered {response.status_code}", retryable=response.status_code in (429, 503)
            )
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > max_bytes:
                raise ToolError(f"{url[:200]} has more than {max_bytes} bytes")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return Fetched(url, kind, bytes(body), response.charset_encoding or "utf-8")
    except LookupError:
        raise ToolError(f"{url[:200]} is in an encoding that nobody knows") from None
    finally:
        await response.aclose()


async def public_address(url: httpx.URL, allow: Sequence[str]) -> str:
    """The address to connect to for a URL.

    Raises:
        ToolError: it is no web address, its host has no address, or one that is not public and not allowed.
    """
    host = url.host
    if url.scheme not in ("http", "https") or not host or url.userinfo:
        raise ToolError(f"{str(url)[:200]!r} is no address of a page: http:// or https://, without a user's name")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        known = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ToolError(f"the host {host[:200]!r} is not known: {error}") from None
    # Version 4 first: many machines have version 6 and no way out by it.
    addresses = sorted((str(info[4][0]) for info in known), key=lambda address: ":" in address)
    if addresses and (host in allow or f"{host}:{port}" in allow):
        return addresses[0]
    if not addresses or not all(map(is_public, addresses)):
        raise ToolError(f"the host {host[:200]!r} is not public, and was not allowed")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's, however it is written."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found.sixtofour is not None:
            found = found.sixtofour
        elif found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast
