"""From pydantic's findings to one paragraph that names the file, the key, what was given and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shoal.config.overrides import Override
from shoal.config.schema import Place, describe, homes_of, kinds_of, locate, path_of, tag_values
from shoal.config.write import inline
from shoal.errors import ConfigError

MAX_SHOWN_CHARS = 80
"""A longer value is cut in messages."""


@dataclass(frozen=True)
class Source:
    """Where the raw tables came from."""

    name: str
    """The file's path, or what else to call it."""
    text: str = ""
    overrides: Sequence[Override] = ()

    def where(self, path: Sequence[str]) -> str:
        """The override or the line that set `path`, or set something in it."""
        for override in reversed(self.overrides if path else ()):
            if override.path[: len(path)] == tuple(path) or tuple(path[: len(override.path)]) == override.path:
                return f"{override.option} (an override of {self.name})"
        line = line_of(self.text, path)
        return f"{self.name}, line {line}" if line else self.name


def explain(error: ValidationError, data: Mapping[str, Any], source: Source) -> ConfigError:
    """The first finding in words (unknown keys before others), and how many more there are."""
    findings = sorted(error.errors(include_url=False), key=lambda finding: finding["type"] != "extra_forbidden")
    first = findings[0]
    path = path_of(first["loc"])
    if first["type"].startswith("union_tag"):
        path = (*path, first["ctx"]["discriminator"].strip("'"))
    place = locate(path, data)
    where = source.where(path)
    more = f" ({len(findings) - 1} more such findings.)" if len(findings) > 1 else ""
    problem, remedy = _words(first, path, place, data)
    return ConfigError(f"In {where}: {problem}", remedy + more)


def _words(finding: Any, path: tuple[str, ...], place: Place, data: Mapping[str, Any]) -> tuple[str, str]:
    """Problem and remedy of one finding."""
    dotted = ".".join(path)
    match finding["type"]:
        case "extra_forbidden":
            return f'there is no key "{path[-1]}" in {_table(path[:-1])}.', _nearest(path, place, data)
        case "missing" | "too_short" if path == ("envs",):
            return "there is no environment to act in.", 'Add a table [envs.NAME] with type = "arithmetic" or another.'
        case "missing" if finding["loc"][-1] == path[-1]:
            return f'{_table(path[:-1])} needs the key "{path[-1]}".', _doc(place)
        case "union_tag_invalid" | "union_tag_not_found":
            allowed = ", ".join(f'"{tag}"' for tag in tag_values(place.kinds)[1])
            given = finding["input"].get(path[-1])
            return f"{dotted} = {_shown(given)} is not known.", f"Allowed: {allowed}."
        case "value_error":
            prefix = f"{_table(path)}: " if path else ""
            return f"{prefix}{finding['ctx']['error']}.", "Change one of the two."
        case _ if place.field is not None:
            allowed = describe(place.field)
            if allowed == "a table":
                tag, by_tag = tag_values(kinds_of(place.field.annotation))
                choice = f" with {tag} = " + " or ".join(f'"{value}"' for value in by_tag) if tag else ""
                return f"{dotted} = {_shown(finding['input'])} is not a table.", f"Write a table [{dotted}]{choice}."
            return f"{dotted} = {_shown(finding['input'])} is not allowed; it must be {allowed}.", _doc(place)
        case "string_pattern_mismatch" | "string_too_short" | "string_too_long":
            return f'the name "{path[-1]}" in {_table(path[:-1])} is not allowed.', (
                "Names are 1 to 64 letters, digits, dashes and underscores, and begin with a letter or digit."
            )
        case _:
            return f"{dotted} = {_shown(finding['input'])} is not a table.", f"Write it as [{dotted}]."


def _nearest(path: tuple[str, ...], place: Place, data: Mapping[str, Any]) -> str:
    """What the user may have meant by an unknown key."""
    key = path[-1]
    known = list(place.section.model_fields) if place.section else []
    tag, by_tag = tag_values(place.kinds)
    owners = [value for value, kind in by_tag.items() if key in kind.model_fields]
    if owners:
        here = next(value for value, kind in by_tag.items() if kind is place.section)
        return f'It belongs to {tag} = "{owners[0]}", and here {tag} = "{here}": remove it, or change {tag}.'
    homes = homes_of(key)
    if homes:
        return f"Did you mean {' or '.join(homes[:3])}?"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f'Did you mean "{close[0]}"?'
    return f"The keys there are: {', '.join(known)}."


def _table(path: Sequence[str]) -> str:
    return f"[{'.'.join(path)}]" if path else "the configuration"


def _doc(place: Place) -> str:
    return " ".join((place.field.description or "").split()) if place.field else ""


def _shown(value: Any) -> str:
    """The value as TOML, cut to a readable length."""
    try:
        text = "a table" if isinstance(value, dict) else inline(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
_KEY = re.compile(r"""^\s*([A-Za-z0-9_."'-]+(?:\s*\.\s*[A-Za-z0-9_."'-]+)*)\s*=""")


def line_of(text: str, path: Sequence[str]) -> int | None:
    """The line of a TOML text that sets `path`, or the nearest table around it; a hint for people, from 1."""
    best: int | None = None
    best_depth = 0
    found: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            found = table = _split(header[1])
        elif key := _KEY.match(line):
            found = table + _split(key[1])
        else:
            continue
        if len(found) > best_depth and tuple(path[: len(found)]) == found:
            best, best_depth = number, len(found)
    return best


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
