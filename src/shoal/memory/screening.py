"""What may not become a memory: answers, orders to the reader, recalled text, what is there already.

Responsibilities: one normal form of texts, and the checks on it. They are the cheap first line. What decides is
replay: an answer that gets past them earns nothing on sibling tasks, an order that harms is measured as harm.

Invariants: any text whatsoever is accepted as input; time is linear in its length (times the number of answers);
`normalise` is idempotent.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Sequence

RECALLED_OPEN, RECALLED_CLOSE = "<recalled-memory>", "</recalled-memory>"
"""Around everything that a prompt was given from memory; `extract` cuts it out."""

SHINGLE_WORDS = 5
MAX_RECALLED_SHARE = 0.3
"""Share of an entry's shingles that may also stand in a recalled text."""

MIN_COMPACT_CHARS = 4
"""Shorter answers are looked for as words only: run together, they turn up by chance."""

MAX_ENCODED = 1024
"""Stretches of a text that are tried as base64 or hexadecimal: no entry has room for more."""

_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WORD = re.compile(r"\w+")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ENCODED = re.compile(r"[A-Za-z0-9+/_-]{8,}={0,2}")
_RECALLED = re.compile(re.escape(RECALLED_OPEN) + r".*?(?:" + re.escape(RECALLED_CLOSE) + r"|\Z)", re.DOTALL)

_ORDERS = {
    "overrides": (
        r"\b(?:ignore|disregard|forget|override|bypass)\b[^.\n]{0,40}"
        r"\b(?:previous|prior|above|earlier|all|any|your|system|safety)\b[^.\n]{0,40}"
        r"\b(?:instructions?|prompts?|rules?|messages?|guidelines?|memor(?:y|ies))"
    ),
    "role": r"(?:^|\n)\s*(?:system|assistant|developer|tool)\s*:",
    "markup": r"<\|[\w ]{1,40}\|>|\[/?inst\]|<</?sys>>|</?(?:tool_call|tool_response|system|function_call)\b",
    "persona": (
        r"\byou are now\b|\bact as (?:an? )?(?:unrestricted|jailbroken|different)|\bnew (?:system )?instructions?:"
    ),
    "secrecy": (
        r"\b(?:do not|don't|never) (?:tell|inform|mention|reveal|show)\b[^.\n]{0,40}\b(?:user|owner|operator|human)"
    ),
    "exfiltration": (
        r"\b(?:send|post|upload|forward|transmit|leak)\b[^.\n]{0,60}"
        r"(?:https?://|\b(?:private key|seed phrase|password|secrets?|credentials|api keys?|token)\b)"
    ),
    "spreading": (
        r"\b(?:store|save|add|write|copy|repeat)\b[^.\n]{0,40}\b(?:this|these)\b[^.\n]{0,40}\b(?:in|to|into)\b"
        r"[^.\n]{0,20}\b(?:memory|memories|every (?:reply|answer|response))"
    ),
    "fixed reply": r"\balways (?:answer|reply|respond|output|say)\b[^.\n]{0,20}(?:\d|\"|')",
}
_ORDER_PATTERNS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _ORDERS.items())

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def normalise(text: str) -> str:
    """The form in which entries are kept: NFKC, nothing invisible, single spaces, no empty lines."""
    shown = _CONTROL.sub(" ", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    shown = unicodedata.normalize("NFKC", shown)
    return "\n".join(line for line in (" ".join(part.split()) for part in shown.split("\n")) if line)


def words(text: str) -> list[str]:
    """Words for comparing: lower case, without punctuation, thousands separators or accents of style."""
    return _WORD.findall(_SEPARATOR.sub("", normalise(text).casefold()))


def without_recalled(text: str) -> str:
    """`text` less everything that came from memory."""
    return _RECALLED.sub(" ", text)


def shingles(text: str) -> set[tuple[str, ...]]:
    """Runs of `SHINGLE_WORDS` words; a shorter text is one run."""
    found = words(text)
    if len(found) <= SHINGLE_WORDS:
        return {tuple(found)} if found else set()
    return {tuple(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1)}


def is_recalled(text: str, recalled: Iterable[str]) -> bool:
    """Whether `text` repeats what the agent was shown from memory."""
    own = shingles(text)
    known: set[tuple[str, ...]] = set().union(*(shingles(item) for item in recalled))
    return bool(own) and len(own & known) > MAX_RECALLED_SHARE * len(own)


def find_order(text: str) -> str:
    """Name of the first kind of order to the reader in `text`; empty where there is none."""
    if _INVISIBLE.search(text):
        return "invisible characters"
    shown = normalise(text)
    for candidate in (shown, *_decoded(shown)):
        for name, pattern in _ORDER_PATTERNS:
            if pattern.search(candidate):
                return name
    return ""


class AnswerFinder:
    """Looks for answers in one text: as they stand, spelled apart, backwards, in number words, or encoded."""

    def __init__(self, text: str) -> None:
        shown = normalise(text)
        haystacks = [words(part) for part in (shown, *_decoded(shown))]
        self._spaced = [f" {' '.join(part)} " for part in haystacks]
        self._compact = ["".join(part) for part in haystacks]

    def holds(self, answers: Sequence[str]) -> bool:
        """Whether the text holds one of `answers`."""
        return any(self._holds(form) for answer in answers for form in _forms(answer))

    def _holds(self, form: list[str]) -> bool:
        run = "".join(form)
        if form and any(f" {' '.join(form)} " in part for part in self._spaced):
            return True
        return len(run) >= MIN_COMPACT_CHARS and any(run in part or run[::-1] in part for part in self._compact)


def _forms(answer: str) -> list[list[str]]:
    spoken = in_words(answer)
    return [words(answer), spoken, [word for word in spoken if word != "and"]]


def in_words(answer: str) -> list[str]:
    """A whole number below a million in English words; empty for anything else."""
    digits = _SEPARATOR.sub("", answer.strip()).removesuffix(".")
    if not re.fullmatch(r"[0-9]{1,6}", digits):
        return []
    value = int(digits)
    thousands, rest = divmod(value, 1000)
    spoken = [*_below_thousand(thousands), "thousand"] if thousands else []
    return spoken + (_below_thousand(rest) if rest or not thousands else [])


def _below_thousand(value: int) -> list[str]:
    hundreds, rest = divmod(value, 100)
    spoken = [_ONES[hundreds], "hundred"] if hundreds else []
    if hundreds and rest:
        spoken.append("and")
    if rest >= 20:
        spoken += [_TENS[rest // 10 - 2]] + ([_ONES[rest % 10]] if rest % 10 else [])
    elif rest or not hundreds:
        spoken.append(_ONES[rest])
    return spoken


def _decoded(text: str) -> list[str]:
    """What stretches of `text` say when read as base64 or hexadecimal."""
    found: list[str] = []
    for match in list(_ENCODED.finditer(text))[:MAX_ENCODED]:
        stretch = match.group()
        for decode in (bytes.fromhex, _from_base64):
            try:
                said = decode(stretch).decode("utf-8")
            except (ValueError, binascii.Error):
                continue
            if said.isprintable():
                found.append(said)
    return found


def _from_base64(stretch: str) -> bytes:
    body = stretch.rstrip("=").translate(str.maketrans("-_", "+/"))
    return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
