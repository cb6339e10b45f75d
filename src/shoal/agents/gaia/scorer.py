"""Whether an answer is the right one, by the rules of the benchmark (arXiv 2311.12983, section 3.2; its leaderboard's
scorer). Pure.

The right answer says which rule holds:

1. It is a number: the answer's `$`, `%` and thousands commas are dropped, and it must be the same number.
2. It has a comma or semicolon: it is a list. Both are split there, must have equally many elements, and each element
   is compared as a number where the right one is, else as text that keeps its punctuation.
3. Otherwise it is text: white space, upper case and punctuation do not count.

Invariant: whatever the answer, the result is yes or no; an answer that is no number is never equal to one.
"""

from __future__ import annotations

import re
import string

_DROPPED = str.maketrans("", "", "$%,")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SEPARATORS = re.compile(r"[,;]")


def is_right(answer: str | None, right: str) -> bool:
    """Whether `answer` counts as `right`."""
    said = "None" if answer is None else answer
    if is_number(right):
        return _same_number(said, right)
    if _SEPARATORS.search(right):
        elements, wanted = _SEPARATORS.split(said), _SEPARATORS.split(right)
        return len(elements) == len(wanted) and all(map(_same_element, elements, wanted))
    return _plain(said).translate(_PUNCTUATION) == _plain(right).translate(_PUNCTUATION)


def is_number(text: str) -> bool:
    """Whether Python reads a text as a number, as the benchmark's scorer does."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _same_element(answer: str, right: str) -> bool:
    return _same_number(answer, right) if is_number(right) else _plain(answer) == _plain(right)


def _same_number(answer: str, right: str) -> bool:
    written = answer.translate(_DROPPED)
    return is_number(written) and float(written) == float(right)


def _plain(text: str) -> str:
    return re.sub(r"\s", "", text).lower()
