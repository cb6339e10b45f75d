"""HTML that is safe by construction: whatever is not `Markup` is escaped where it enters.

The only way from text to `Markup` is `tag` and `join`, which escape; so a model's output, a worker's name or an
event's data can never become an element of a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Characters that HTML forbids, and those that reorder the text around them."""

VOID_ELEMENTS = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """A value as HTML text: markup as it is, everything else escaped."""
    return value if isinstance(value, Markup) else Markup(escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def join(parts: Iterable[object]) -> Markup:
    """Several values one after the other."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: str) -> Markup:
    """An element. `class_` becomes `class`; other underscores become hyphens."""
    assert _NAME.fullmatch(name)
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    opening = "".join(f' {key}="{text(str(value))}"' for key, value in pairs)
    closing = "" if name in VOID_ELEMENTS else f"{join(children)}</{name}>"
    return Markup(f"<{name}{opening}>{closing}")
