"""Values of a record's type, drawn at random: what a fuzzer begins from and goes back to.

Values keep the types and not the records' own rules, so most are refused by `check`, some far inside it.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

DEPTH = 4
WORDS = ("", "a", "run", "0.0.0.0:1", "../x", "worker", "é\x00", "-1", "1e309", "shoal", "x" * 65)
WHOLE = (0, 1, -1, 2, 7, 255, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)
REAL = (0.0, -0.0, 1.0, -1.5, 0.25, 1e308, 5e-324, math.inf, -math.inf, math.nan)
LENGTHS = (0, 1, 4, 8, 16, 32, 64, 65)


def plain(kind: Any, draw: Random) -> Any:
    """A value of the type as JSON and MessagePack have it."""
    return _drawn(inspect.type_info(kind), draw, DEPTH)


def _drawn(info: inspect.Type, draw: Random, depth: int) -> Any:
    match info:
        case inspect.StructType():
            return _struct(info, draw, depth)
        case inspect.UnionType(types=types):
            return _drawn(draw.choice(types), draw, depth)
        case inspect.LiteralType(values=values):
            return draw.choice(values)
        case inspect.BoolType():
            return draw.random() < 0.5
        case inspect.IntType():
            return draw.choice(WHOLE) if draw.random() < 0.5 else draw.randint(0, 100)
        case inspect.FloatType():
            return draw.choice(REAL) if draw.random() < 0.3 else draw.random() * 10
        case inspect.StrType():
            return draw.choice(WORDS)
        case inspect.BytesType():
            return draw.randbytes(draw.choice(LENGTHS))
        case inspect.NoneType():
            return None
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            return [_drawn(info.item_type, draw, depth - 1) for _ in range(_count(draw, depth))]
        case inspect.TupleType(item_types=types):
            return [_drawn(one, draw, depth - 1) for one in types]
        case inspect.DictType(key_type=key, value_type=value):
            pairs = range(_count(draw, depth))
            return {_drawn(key, draw, depth - 1): _drawn(value, draw, depth - 1) for _ in pairs}
        case inspect.EnumType(cls=cls):
            return draw.choice(list(cls)).value
        case _:
            return draw.choice([None, 1, "x", [], {}])


def _count(draw: Random, depth: int) -> int:
    return draw.randint(0, 3) if depth > 0 else 0


def _struct(info: inspect.StructType, draw: Random, depth: int) -> Any:
    given = {}
    for field in info.fields:
        if not field.required and not info.array_like and (depth <= 0 or draw.random() < 0.3):
            continue
        given[field.encode_name] = _drawn(field.type, draw, depth - 1)
    tag = {} if info.tag is None else {info.tag_field: info.tag}
    return list((tag | given).values()) if info.array_like else tag | given


def mutated(value: Any, draw: Random) -> Any:
    """The value with one of its parts changed, left out, doubled or exchanged."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return draw.choice([rest, {**value, "x": 1}, *[{**value, key: mutated(value[key], draw)}] * 6])
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        changed = [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
        return draw.choice([value[:at], value + value[at:], *[changed] * 4])
    if isinstance(value, bytes) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return draw.choice([value[:at], value + b"\0", value[:at] + draw.randbytes(1) + value[at + 1 :]])
    nested: Any = []
    for _ in range(draw.choice((1, 40, 2000))):
        nested = [nested]
    return draw.choice([None, True, nested, {}, draw.choice(WORDS), draw.choice(WHOLE), draw.choice(REAL), b"\xff"])


def unpacked(data: bytes) -> Any:
    """MessagePack's values; None where it is none, or too deep."""
    try:
        return msgspec.msgpack.decode(data, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError):
        return None


def packed(value: Any) -> bytes:
    """The values as MessagePack; nothing where they can't be."""
    try:
        return msgspec.msgpack.encode(value)
    except (msgspec.EncodeError, RecursionError, OverflowError, ValueError, TypeError):
        return b""


def as_json(value: Any) -> bytes:
    """The values as JSON; nothing where they can't be."""
    try:
        return msgspec.json.encode(value)
    except (msgspec.EncodeError, RecursionError, OverflowError, ValueError, TypeError):
        return b""
