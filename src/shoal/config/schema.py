"""Which keys exist where: questions to the section classes that overrides and error messages both ask.

Pure functions of the classes in `root`. A *path* is a tuple of keys as written in TOML, such as
`("learner", "loss", "eps_low")`. A section that comes in kinds is told apart by its *tag*, the one key whose type is
a single literal in every kind; a table without it is of the first kind.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from shoal.config.base import Section
from shoal.config.root import Config


@dataclass(frozen=True)
class Place:
    """What a path leads to."""

    section: type[Section] | None
    """The section that holds the path's last key; `None` inside a free table or a table of named tables."""
    field: FieldInfo | None
    """The field itself; `None` where there is no such key, and in free tables."""
    kinds: tuple[type[Section], ...] = ()
    """All kinds of `section`, where there are several."""
    unknown_at: int | None = None
    """Index of the path's first key that does not exist."""


def kinds_of(annotation: Any) -> tuple[type[Section], ...]:
    """The section classes that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in kinds_of(member))
    return ()


def tag_values(kinds: Sequence[type[Section]]) -> tuple[str, dict[str, type[Section]]]:
    """The tag's key and the kind that each of its values names; `("", {})` where there is a single kind."""
    if len(kinds) < 2:
        return "", {}
    for key in kinds[0].model_fields:
        literals = [get_args(kind.model_fields[key].annotation) for kind in kinds if key in kind.model_fields]
        if len(literals) == len(kinds) and all(len(values) == 1 for values in literals):
            return key, {values[0]: kind for values, kind in zip(literals, kinds, strict=True)}
    raise AssertionError(f"sections {kinds} have no tag in common")


def kind_of(kinds: Sequence[type[Section]], table: Any) -> type[Section]:
    """The kind that `table` says it is; the first where it says nothing or nonsense."""
    key, by_tag = tag_values(kinds)
    tag = table.get(key) if isinstance(table, Mapping) else None
    return by_tag.get(tag, kinds[0]) if isinstance(tag, str) else kinds[0]


def locate(path: Sequence[str], data: Any) -> Place:
    """Where `path` leads in the configuration whose raw tables are `data` (needed to know each section's kind)."""
    annotation: Any = Config
    place = Place(None, None)
    for index, key in enumerate(path):
        kinds = kinds_of(annotation)
        if kinds:
            section = kind_of(kinds, data)
            if key not in section.model_fields:
                return Place(section, None, kinds, index)
            field = section.model_fields[key]
            place, annotation = Place(section, field, kinds), field.annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            place = Place(None, None)
            if annotation is Any:
                return place
        else:
            return Place(place.section, None, place.kinds, index)
        data = data.get(key) if isinstance(data, Mapping) else None
    return place


def path_of(loc: Sequence[int | str]) -> tuple[str, ...]:
    """The TOML path of a pydantic error location, which also names the kinds it passed through."""
    annotation: Any = Config
    path: list[str] = []
    for item in loc:
        kinds = kinds_of(annotation)
        _, by_tag = tag_values(kinds)
        if isinstance(item, int) or item == "[key]":
            break
        if item in by_tag:
            annotation = by_tag[item]
            continue
        path.append(item)
        if kinds and item in kinds[0].model_fields:
            annotation = kinds[0].model_fields[item].annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = None
    return tuple(path)


def is_optional(field: FieldInfo) -> bool:
    """Whether the key may be absent as a setting of its own."""
    return types.NoneType in get_args(field.annotation)


def is_text(field: FieldInfo) -> bool:
    """Whether only text can stand here."""
    members = [t for t in (get_args(field.annotation) or (field.annotation,)) if t is not types.NoneType]
    return members == [str] or get_origin(field.annotation) is Literal


def homes_of(key: str) -> list[str]:
    """Dotted paths of every field called `key`, over all sections and kinds."""

    def search(kinds: Sequence[type[Section]], prefix: str) -> list[str]:
        found: list[str] = []
        for section in kinds:
            for name, field in section.model_fields.items():
                if name == key:
                    found.append(prefix + name)
                found += search(kinds_of(field.annotation), f"{prefix}{name}.")
        return found

    return list(dict.fromkeys(search((Config,), "")))


def describe(field: FieldInfo) -> str:
    """What may stand here, in words: `a number above 0 and at most 100`."""
    members = [t for t in (get_args(field.annotation) or (field.annotation,)) if t is not types.NoneType]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in members) if len(members) > 1 else f'"{members[0]}"'
    if get_origin(field.annotation) is tuple:
        element = get_args(members[0])[0] if get_origin(members[0]) is Annotated else members[0]
        inner = {str: "texts", float: "numbers", int: "whole numbers"}[element]
        words = f"a list of {inner}" if Ellipsis in members else f"a list of {len(members)} {inner}"
    elif kinds_of(field.annotation) or get_origin(field.annotation) is dict:
        words = "a table"
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[members[0]]
    bounds: list[str] = []
    for rule in field.metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                bounds.append(f"at least {bound}")
            case annotated_types.Gt(gt=bound):
                bounds.append(f"above {bound}")
            case annotated_types.Le(le=bound):
                bounds.append(f"at most {bound}")
            case annotated_types.Lt(lt=bound):
                bounds.append(f"below {bound}")
            case annotated_types.MinLen(min_length=length):
                bounds.append(f"of length {length} or more")
            case annotated_types.MaxLen(max_length=length):
                bounds.append(f"of length {length} or less")
            case _ if getattr(rule, "pattern", None):
                bounds.append("in the form described")
            case _:
                pass
    return f"{words}, {' and '.join(bounds)}" if bounds else words
