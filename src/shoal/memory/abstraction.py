"""An admitted memory's abstract form: what is true of one instance becomes a typed placeholder, by rules.

    "Send 12.5 USDT to 0x4b1D…5701 before you call 'stake'" -> "Send <number> USDT to <address> before you call <name>"

Invariants: pure; an abstract form holds no number, address, link, mail or quoted text of its origin; a text from which
too little is left, or nothing was taken, has none.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from shoal.memory.records import Entry, Provenance
from shoal.memory.screening import normalise, words

MIN_WORDS = 4
"""An abstract form with fewer words of its own says nothing."""

_PLACEHOLDERS = (
    ("link", re.compile(r"\bhttps?://\S+")),
    ("mail", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")),
    ("address", re.compile(r"\b0x[0-9a-fA-F]{6,}\b")),
    ("name", re.compile(r"'[^'\n]{1,80}'|\"[^\"\n]{1,80}\"|`[^`\n]{1,80}`")),
    ("date", re.compile(r"\b\d{4}-\d{2}-\d{2}(?:T[\d:.]+Z?)?\b")),
    ("number", re.compile(r"(?<![\w<])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")),
    ("code", re.compile(r"\b(?=\w*\d)\w+\b")),
    ("name", re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")),
)  # fmt: skip
_PLACEHOLDER = re.compile(r"<(?:link|mail|address|name|date|number|code)>")


def abstract(entry: Entry, family: str = "") -> Entry | None:
    """The abstract form of `entry`, for `family` (by default its own); None where there is none worth having.

    In its own family it starts at gamma times its origin's weight; in another it is a candidate like any other.
    """
    text = entry.text
    for name, pattern in _PLACEHOLDERS:
        text = pattern.sub(f"<{name}>", text)
    text = normalise(text)
    if text == entry.text or len(words(_PLACEHOLDER.sub(" ", text))) < MIN_WORDS:
        return None
    provenance = Provenance(
        rule="abstract", context=entry.provenance.context, origin=entry.id, node=entry.provenance.node
    )
    return replace(entry, text=text, family=family or entry.family, provenance=provenance)
