"""One form for answers that mean the same, so that votes add up. Pure.

    number      1,000.0   1000   "1000 km"?  no: a unit is part of the answer      -> "1000"
    fraction    2/6   6/8                                                          -> "1/3"   "0.75"
    option      (B)   b.   B)                                                      -> "b"
    text        The  Arle.                                                         -> "the arle" without article: "arle"

Invariants: canonical(canonical(x)) == canonical(x); an answer of nothing but space or marks is None: it abstains.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from shoal.envs.extract import last_number, parse_number

MAX_CHARS = 2000
"""Of an answer; more is no answer."""

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?\d+)\s*/\s*(\d+)")
_OPTION = re.compile(r"\(?([a-z])[).:]?")
_BRACKETED = re.compile(r"\(([A-Za-z])\)")
_ARTICLE = re.compile(r"^(?:the|a|an)\s+(?=\S)")
_EDGES = " \t\n\"'`*_.,;:!?()[]{}"


def canonical(answer: str) -> str | None:
    """The form in which answers are compared; None where there is none."""
    text = unicodedata.normalize("NFKC", answer).casefold().strip()
    text = unicodedata.normalize("NFKC", text)
    if not text or len(text) > MAX_CHARS:
        return None
    if found := _OPTION.fullmatch(text):
        return found[1]
    bare = text.strip(_EDGES).lstrip("$€£").strip()
    if _NUMBER.fullmatch(bare):
        return _plain(Fraction(bare.replace(",", "")))
    if (found := _FRACTION.fullmatch(bare)) and int(found[2]):
        return _plain(Fraction(int(found[1]), int(found[2])))
    words = " ".join(bare.split())
    while (shorter := _ARTICLE.sub("", words).strip(_EDGES)) != words:
        words = shorter
    return words or None


def is_right(answer: str | None, truth: str) -> bool:
    """Whether an answer is the known one: the same in canonical form, or one whose last number or option it is."""
    if answer is None:
        return False
    if canonical(answer) == canonical(truth):
        return True
    if option := _BRACKETED.fullmatch(truth.strip()):
        named = _BRACKETED.findall(answer)
        return bool(named) and named[-1].casefold() == option[1].casefold()
    gold = parse_number(truth)
    return gold is not None and last_number(answer) == gold


def _plain(value: Fraction) -> str:
    """A whole number or a decimal that ends, without an exponent; any other as a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    whole = abs(value.numerator * 10**digits // value.denominator)
    text = str(whole).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"
