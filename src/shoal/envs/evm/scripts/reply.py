"""The script in a reply: a fenced block of its language, or the whole reply where that is a script."""

from __future__ import annotations

import re
from typing import Literal

from shoal.envs.evm.actions import ActionError

Language = Literal["typescript", "python"]

MAX_SCRIPT_CHARS = 60_000
ENTRY: dict[Language, str] = {"typescript": "executeSkill", "python": "execute_skill"}
"""The function that a script must define."""

_NAMES: dict[Language, tuple[str, ...]] = {
    "typescript": ("", "typescript", "ts", "javascript", "js"),
    "python": ("", "python", "python3", "py"),
}
_BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\s`]*)[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
"""A block of any language: one that is passed over would leave its end to be read as a beginning."""


def find_script(reply: str, language: Language) -> str:
    """The last fenced block that defines the entry function, or the reply itself where it has no block.

    Raises:
        ActionError: there is none, or it is too long.
    """
    blocks = [(found[1].lower(), found[2]) for found in _BLOCK.finditer(reply)]
    candidates = [block for name, block in blocks if name in _NAMES[language] and ENTRY[language] in block]
    if not candidates and "```" not in reply and ENTRY[language] in reply:
        candidates = [reply]
    if not candidates:
        raise ActionError(f"there is no {language} block that defines {ENTRY[language]}")
    if len(candidates[-1]) > MAX_SCRIPT_CHARS:
        raise ActionError(f"the script has more than {MAX_SCRIPT_CHARS} characters")
    return candidates[-1]
