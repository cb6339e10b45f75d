"""Call data and results: encoding by signature, decoding by what is known of our contracts.

Invariant: `encode` never guesses: a signature that is not well-formed, or arguments that do not fit it, is an
`AbiError`, which an agent reads as an observation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import DecodingError, EncodingError, ParseError
from eth_utils.crypto import keccak

from shoal.envs.evm.genesis import contract_file

MAX_SIGNATURE_CHARS = 200
_SIGNATURE = re.compile(r"([A-Za-z_$][A-Za-z0-9_$]*)\(([A-Za-z0-9\[\],]*)\)")


class AbiError(Exception):
    """A signature or arguments that cannot be encoded."""


@dataclass(frozen=True, slots=True)
class Function:
    signature: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    selector: bytes


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    inputs: tuple[str, ...]
    indexed: tuple[bool, ...]
    topic: bytes

    def values(self, topics: Sequence[bytes], data: bytes) -> list[Any]:
        """An event's arguments in their order: indexed ones are in its topics, the others in its data."""
        pairs = list(zip(self.inputs, self.indexed, strict=True))
        from_topics = iter(topics[1:])
        from_data = iter(decode([kind for kind, indexed in pairs if not indexed], data))
        return [decode([kind], next(from_topics))[0] if indexed else next(from_data) for kind, indexed in pairs]


@dataclass(frozen=True)
class Interface:
    """What one contract offers."""

    functions: dict[tuple[str, int], Function]
    """By name and number of arguments: none of our contracts overloads beyond that."""
    events: dict[str, Event]


@lru_cache(maxsize=4096)
def parse_signature(signature: str) -> tuple[str, tuple[str, ...]]:
    """Name and argument types of `transfer(address,uint256)`; raises `AbiError`."""
    text = signature.replace(" ", "")[: MAX_SIGNATURE_CHARS + 1]
    found = _SIGNATURE.fullmatch(text)
    if found is None or len(text) > MAX_SIGNATURE_CHARS:
        raise AbiError(f"{signature[:80]!r} is not a signature such as transfer(address,uint256)")
    return found[1], tuple(found[2].split(",")) if found[2] else ()


@lru_cache(maxsize=4096)
def selector(signature: str) -> bytes:
    """The first four bytes of the hash of a signature."""
    name, types = parse_signature(signature)
    return bytes(keccak(text=f"{name}({','.join(types)})")[:4])


def encode(signature: str, args: Sequence[Any]) -> bytes:
    """Call data of a function; raises `AbiError`."""
    try:
        return _encode_known(signature, *args)
    except TypeError:
        # A list among the arguments: nothing to look up.
        return _encode(signature, *args)


def _encode(signature: str, *args: Any) -> bytes:
    _, types = parse_signature(signature)
    if len(types) != len(args):
        raise AbiError(f"{signature} takes {len(types)} arguments, not {len(args)}")
    try:
        return selector(signature) + bytes(abi_encode(types, args))
    except (EncodingError, ParseError, ValueError, TypeError, OverflowError) as error:
        raise AbiError(f"the arguments do not fit {signature}: {' '.join(str(error).split())[:160]}") from None


_encode_known = lru_cache(maxsize=8192, typed=True)(_encode)
"""The same few reads are made in every episode; `typed` keeps true apart from 1."""


def decode(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """Values of the types, addresses in lower case; raises `AbiError`."""
    if len(data) == 32 and tuple(types) == ("uint256",):
        return (int.from_bytes(data, "big"),)
    try:
        return tuple(abi_decode(types, data))
    except (DecodingError, ParseError, ValueError, OverflowError) as error:
        raise AbiError(f"what came back is not {','.join(types)}") from error


@lru_cache(maxsize=1)
def interfaces() -> dict[str, Interface]:
    """Our contracts' interfaces, by contract."""
    artifacts = json.loads(contract_file("artifacts.json"))
    found = {}
    for contract, artifact in artifacts.items():
        functions: dict[tuple[str, int], Function] = {}
        events: dict[str, Event] = {}
        for entry in artifact["abi"]:
            types = tuple(i["type"] for i in entry.get("inputs", ()))
            if entry["type"] == "function":
                signature = f"{entry['name']}({','.join(types)})"
                outputs = tuple(o["type"] for o in entry["outputs"])
                functions[entry["name"], len(types)] = Function(signature, types, outputs, selector(signature))
            elif entry["type"] == "event":
                indexed = tuple(i["indexed"] for i in entry["inputs"])
                topic = bytes(keccak(text=f"{entry['name']}({','.join(types)})"))
                events[entry["name"]] = Event(entry["name"], types, indexed, topic)
        found[contract] = Interface(functions, events)
    # Whoever talks to the proxy talks through it.
    found["Proxy"] = found["Implementation"]
    return found


@lru_cache(maxsize=1)
def known_functions() -> dict[str, Function]:
    """Every function of our contracts, by signature: how a query's result is decoded."""
    return {f.signature: f for i in interfaces().values() for f in i.functions.values()}
