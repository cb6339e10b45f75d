"""Answers out of replies: pure functions from text to the number, choice or phrase that a grader compares.

Invariants: every function takes any text whatsoever (it comes from a model, perhaps on a stranger's machine), takes
time linear in its length, and never raises. `final_number(t)` is either None or `last_number(t)`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Sequence
from decimal import Decimal

MAX_NUMBER_CHARS = 64
"""A longer run of digits is no answer; it counts as a number that equals nothing."""

MAX_CHOICES = 26

_NUMBER = re.compile(
    r"""
    (?:(?<![0-9A-Za-z)\]])[-\u2212+])?             # a sign, where it cannot be an operator
    (?: (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9])    # thousands separators
          | [0-9]+ )
        (?: \.[0-9]+ )?                            # a full stop alone ends the sentence, not the number
      | (?<![0-9.]) \.[0-9]+ )
    """,
    re.VERBOSE,
)

_CLOSERS = re.compile(r"(?:</?\w{1,32}>|[\s.!?;:,*_~`'\"\u2019\u201d\u00bb)\]}>$|\\])*+\Z")
"""What may follow a final answer: closing punctuation, brackets, Markdown, LaTeX and tags, but no words."""

_LEAD = re.compile(r"^(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*(?=[:=]))\s*[:=]?\s*", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z0-9])([A-Za-z])(?![A-Za-z0-9'\u2019])")
_MARKUP = re.compile(r"[*_`$]+|\\boxed|\\text")


def _last_match(text: str) -> re.Match[str] | None:
    return deque(_NUMBER.finditer(text), maxlen=1).pop() if _NUMBER.search(text) else None


def _value(match: re.Match[str]) -> Decimal:
    digits = match.group().replace(",", "").replace("\u2212", "-")
    return Decimal(digits) if len(digits) <= MAX_NUMBER_CHARS else Decimal("NaN")


def last_number(text: str) -> Decimal | None:
    """The last number in `text`: "1,234" is 1234, "12." is 12, "-7" is -7, "17-42" ends in 42."""
    match = _last_match(text)
    return None if match is None else _value(match)


def final_number(text: str) -> Decimal | None:
    """The number that `text` ends with, when only closing punctuation or markup follows it; else None."""
    match = _last_match(text)
    return None if match is None or not _CLOSERS.match(text, match.end()) else _value(match)


def parse_number(text: str) -> Decimal | None:
    """`text` as one number and nothing else (a currency or percent sign beside it allowed); else None."""
    bare = text.strip().strip("$\u20ac\u00a3%").strip()
    match = _NUMBER.fullmatch(bare)
    return None if match is None else _value(match)


def after_marker(text: str, marker: str = "####") -> str:
    """What follows the last `marker` (GSM8K puts the answer there), or all of `text` without one; stripped."""
    return text.rpartition(marker)[2].strip()


def tagged(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`, stripped; None without one."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return inside.strip() if closing and opening else None


def last_line(text: str) -> str:
    """The last line that is not blank, without a lead such as "Answer:"; empty for blank text."""
    for line in reversed(text.splitlines()):
        if line.strip():
            return _LEAD.sub("", line.strip(), count=1).strip()
    return ""


def normalise(text: str) -> str:
    """`text` for comparison: Unicode NFKC, lower case, Markdown dropped, blanks joined, outer punctuation dropped."""
    plain = _MARKUP.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(plain.split()).strip(" .,;:!?'\"()[]{}<>")


def choice(text: str, choices: Sequence[str]) -> int | None:
    """Which of `choices` a reply names in its last line: by letter ("B", "(b)", "the answer is B.") or by its text."""
    letters = min(len(choices), MAX_CHOICES)
    line = last_line(_MARKUP.sub("", text))
    spoken = normalise(line)
    exact = [i for i, one in enumerate(choices) if normalise(one) == spoken and spoken]
    if len(exact) == 1:
        return exact[0]
    found = [m.group(1) for m in _LETTER.finditer(line)]
    # "a" and "i" are also words; a lower-case letter counts only where it stands alone or in brackets.
    named = [x for x in found if x.isupper() or len(spoken) == 1 or f"({x})" in line]
    index = ord(named[-1].upper()) - ord("A") if named else letters
    return index if index < letters else None
