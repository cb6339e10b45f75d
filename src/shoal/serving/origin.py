"""Whether another site's page may be behind a request: asked by servers that listen on this machine and want no key.

A browser sends whatever any page asks for, to this machine as well: a form of a stranger's page needs nobody's consent.
And a page whose owner points its name here (DNS rebinding) could read the answers. A key stops both, since no browser
adds it by itself; where there is none, this does.

Invariants: what names another origin is refused, whatever it asks for; so is whoever asked for this server by a name
that is not this machine's.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from shoal.serving.errors import ApiError

KEY = "with a key (--new-key NAME) other names and pages are answered"


def check_page(headers: Headers) -> None:
    """Pass what programs and pages of this machine's own server send.

    Raises:
        ApiError: a page of another site may be behind it.
    """
    if not is_of_this_machine(name_of(headers)):
        raise ApiError(421, f"This name is not answered here: {KEY}.", code="foreign_host")
    if not same_origin(headers):
        raise ApiError(403, f"This was asked by a page of another site: {KEY}.", code="foreign_origin")


def name_of(headers: Headers) -> str:
    """The name by which the server was asked for, without its port; empty where it is none."""
    try:
        return (urlsplit(f"//{headers.get('host', '')}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_of_this_machine(name: str) -> bool:
    """Whether a name, or an address, is this machine's and nobody else's to point anywhere."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def same_origin(headers: Headers) -> bool:
    """Whether a page of this server asks, or no page at all."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host", "")
    except ValueError:
        return False
