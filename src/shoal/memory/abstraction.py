"""An admitted memory's abstract form: what is true of one instance becomes a typed placeholder, by rules.

    "Send 12.5 USDT to 0x4b1D…5701 before you call 'stake'" -> "Send <number> USDT to <address> before you call <name>"

What an act is made of stays: the keys of JSON, and the tool, action or function that it names.

Invariants: pure; an abstract form holds no number, address, link or mail of its origin, and no quoted text but such
keys and names; a text from which too little is left, or nothing was taken, has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.memory.records import Entry, Provenance
from shoal.memory.screening import normalise, words

MIN_WORDS = 4
"""An abstract form with fewer words of its own says nothing."""

_STRUCTURE = r'"(?:tool|action|function)"\s*:\s*"[^"\n]{1,80}"|"[^"\n]{1,80}"\s*:'

_PLACEHOLDERS = (
    ("link", re.compile(r"\bhttps?://\S+")),
    ("mail", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")),
    ("address", re.compile(r"\b0x[0-9a-fA-F]{6,}\b")),
    ("name", re.compile(rf"({_STRUCTURE})|'[^'\n]{{1,80}}'|\"[^\"\n]{{1,80}}\"|`[^`\n]{{1,80}}`")),
    ("date", re.compile(r"\b\d{4}-\d{2}-\d{2}(?:T[\d:.]+Z?)?\b")),
    ("number", re.compile(r"(?<![\w<])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")),
    ("code", re.compile(r"\b(?=\w*\d)\w+\b")),
    ("name", re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")),
)  # fmt: skip
_PLACEHOLDER = re.compile(r"<(?:link|mail|address|name|date|number|code)>")


@dataclass(frozen=True)
class _Placeholder:
    """What a match becomes: itself, where it is an act's structure."""

    text: str

    def __call__(self, found: re.Match[str]) -> str:
        structure = found[1] if found.re.groups else None
        return structure or self.text


def abstract(entry: Entry, family: str = "") -> Entry | None:
    """The abstract form of `entry`, for `family` (by default its own); None where there is none worth having.

    In its own family it starts at gamma times its origin's weight; in another it is a candidate like any other.
    """
    text = entry.text
    for name, pattern in _PLACEHOLDERS:
        text = pattern.sub(_Placeholder(f"<{name}>"), text)
    text = normalise(text)
    if text == entry.text or len(words(_PLACEHOLDER.sub(" ", text))) < MIN_WORDS:
        return None
    provenance = Provenance(
        rule="abstract", context=entry.provenance.context, origin=entry.id, node=entry.provenance.node
    )
    return replace(entry, text=text, family=family or entry.family, provenance=provenance)
