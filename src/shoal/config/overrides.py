"""Dotted overrides from the command line: `--learner.lr 2e-6`, `--learner.lr=2e-6`.

Values are read as TOML; what is no TOML value is text, so quotes are rarely needed. Two rules beyond plain
assignment: `none` removes a key that may be absent (`--learner.lora none`), and choosing another kind of a section
(`--learner.mode pull`) drops the keys of the file that the new kind does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.config.schema import is_optional, is_text, kind_of, locate, tag_values
from shoal.config.toml import NoToml, tables_of
from shoal.errors import ConfigError

MAX_VALUE_CHARS = 65536
"""The longest value of one override."""


@dataclass(frozen=True)
class Override:
    """One assignment as the user wrote it."""

    path: tuple[str, ...]
    text: str

    @property
    def option(self) -> str:
        """The option's name, for messages."""
        return "--" + ".".join(self.path)


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """The overrides in a list of command-line arguments.

    Raises:
        ConfigError: an argument is no option, or an option has no value.
    """
    found: list[Override] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        path = tuple(name.split("."))
        if not argument.startswith("--") or not all(path):
            raise ConfigError(
                f"The argument {argument!r} is neither an option nor an override.",
                "Overrides are written --section.key VALUE, such as --learner.lr 2e-6.",
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"The override {argument} has no value.", f"Write {argument} VALUE.")
            text = rest.pop(0)
        if len(text) > MAX_VALUE_CHARS:
            raise ConfigError(f"The value of --{name} has {len(text)} characters.", f"At most {MAX_VALUE_CHARS} fit.")
        found.append(Override(path, text))
    return found


def apply_overrides(data: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of the raw tables `data` with the overrides applied, later ones last.

    Overrides that choose a section's kind come first, whatever their place, so that no order can undo another.
    Unknown keys are left for the validation that follows, which explains them.
    """
    result: dict[str, Any] = _copy(data)
    for override in sorted(overrides, key=lambda o: not _chooses_kind(o, data)):
        *parents, key = override.path
        table = result
        for depth, parent in enumerate(parents, start=1):
            child = table.setdefault(parent, {})
            if not isinstance(child, dict):
                at = ".".join(parents[:depth])
                raise ConfigError(
                    f"{override.option} cannot be set: {at} is the value {child!r}.", "Only a table has keys."
                )
            table = child
        place = locate(override.path, result)
        if override.text == "none" and place.field is not None and is_optional(place.field):
            table.pop(key, None)
            continue
        value = _value(override.text)
        if not isinstance(value, str) and place.field is not None and is_text(place.field):
            value = override.text
        table[key] = value
        if key == tag_values(place.kinds)[0]:
            known = kind_of(place.kinds, table).model_fields
            for other in [k for k in table if k not in known and any(k in kind.model_fields for kind in place.kinds)]:
                del table[other]
    return result


def _chooses_kind(override: Override, data: Mapping[str, Any]) -> bool:
    kinds = locate(override.path, data).kinds
    return bool(kinds) and override.path[-1] == tag_values(kinds)[0]


def _value(text: str) -> Any:
    """`text` as a TOML value, or as it is where it is none."""
    try:
        parsed = tables_of(f"value = {text}")
    except NoToml:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
