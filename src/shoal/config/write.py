"""Writing a configuration: the resolved TOML of `--dry-run` and of each run's folder.

Invariant: reading what was written gives an equal configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoal.config.root import Config


def to_toml(config: Config, *, comments: bool = False) -> str:
    """The whole configuration with every default filled in; with `comments`, each key's documentation above it."""
    return "\n".join(_table(config, (), comments)).lstrip("\n") + "\n"


def _table(section: BaseModel, path: tuple[str, ...], comments: bool) -> Iterator[str]:
    """Lines of one section: its own keys first, its tables after them, as TOML needs it."""
    fields = type(section).model_fields
    values = {key: getattr(section, key) for key in fields if getattr(section, key) is not None}
    plain = {key: value for key, value in values.items() if not isinstance(value, BaseModel | Mapping)}
    plain = dict(sorted(plain.items(), key=lambda item: not _is_tag(fields[item[0]])))
    if path and (plain or not values):
        yield f"\n[{'.'.join(path)}]"
    for key, value in plain.items():
        if comments and fields[key].description:
            yield from (f"# {line}" for line in str(fields[key].description).splitlines())
        yield f"{key} = {inline(value)}"
    for key, value in values.items():
        if isinstance(value, BaseModel):
            yield from _table(value, (*path, key), comments)
        elif isinstance(value, Mapping):
            yield from _mapping(value, (*path, key), comments)


def _mapping(table: Mapping[str, Any], path: tuple[str, ...], comments: bool) -> Iterator[str]:
    """Lines of a table with free keys: named sections, or an environment's own settings."""
    if any(isinstance(value, BaseModel) for value in table.values()):
        for name, value in table.items():
            yield from _table(value, (*path, name), comments)
    elif table:
        nested: Any = dict(table)
        for key in reversed(path):
            nested = {key: nested}
        yield "\n" + tomli_w.dumps(nested).rstrip("\n")


def _is_tag(field: FieldInfo) -> bool:
    """Whether the key says which kind its section is: it comes first."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def inline(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(inline(item) for item in value)}]"
    return tomli_w.dumps({"": value}).removeprefix('"" = ').rstrip("\n")
