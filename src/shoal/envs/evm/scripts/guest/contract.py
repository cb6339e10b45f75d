"""Contracts for Python scripts: functions by an ABI, as call data, as reads, as unsigned transactions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_abi.abi import decode, encode
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

ARTIFACTS = Path("/packages/artifacts.json")
"""The interfaces of the contracts that every quest starts with, by contract."""

_HUMAN = re.compile(r"(?:function\s+)?([A-Za-z_$][\w$]*)\s*\(([^()]*)\)([^()]*?)(?:returns\s*\(([^()]*)\))?\s*;?")


@dataclass(frozen=True)
class Function:
    """One function of a contract."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def signature(self) -> str:
        return f"{self.name}({','.join(self.inputs)})"

    @property
    def selector(self) -> bytes:
        return bytes(keccak(text=self.signature)[:4])


def read_abi(abi: Sequence[Any] | str) -> list[Function]:
    """The functions of an ABI: JSON text, its objects, or lines such as `function f(address to) returns (uint256)`."""
    if isinstance(abi, str):
        abi = json.loads(abi) if abi.lstrip().startswith("[") else [abi]
    functions = []
    for entry in abi:
        if isinstance(entry, dict):
            if entry.get("type", "function") == "function":
                kinds = [[_canonical(p["type"]) for p in entry.get(key) or ()] for key in ("inputs", "outputs")]
                functions.append(Function(entry["name"], tuple(kinds[0]), tuple(kinds[1])))
        elif found := _HUMAN.fullmatch(str(entry).strip()):
            functions.append(Function(found[1], _types(found[2]), _types(found[4] or "")))
        elif not str(entry).lstrip().startswith(("event", "error", "constructor")):
            raise ValueError(f"{entry!r} is no function of an ABI")
    return functions


def _types(text: str) -> tuple[str, ...]:
    return tuple(_canonical(part.split()[0]) for part in text.split(",") if part.strip())


def _canonical(kind: str) -> str:
    return re.sub(r"^(u?int)(?![0-9])", r"\g<1>256", kind)


def argument(kind: str, value: Any) -> Any:
    """`value` as the codec wants it: hex for bytes is read, so are numbers written as digits."""
    if kind.endswith("]"):
        return [argument(kind[: kind.rindex("[")], item) for item in value]
    if kind.startswith("bytes") and isinstance(value, str):
        return bytes.fromhex(value[2:]) if value.startswith("0x") else value.encode()
    if kind.startswith(("uint", "int")) and isinstance(value, str):
        return int(value, 0)
    return value


def result(kind: str, value: Any) -> Any:
    """A decoded value as scripts read it: addresses with their checksum, tuples as lists."""
    if isinstance(value, tuple | list):
        return [result(kind[: kind.rindex("[")], item) for item in value]
    return to_checksum_address(value) if kind == "address" else value


class BoundFunction:
    """A function with its arguments: to be called, or to become a transaction."""

    def __init__(self, contract: Contract, function: Function, args: Sequence[Any]) -> None:
        self._contract = contract
        self._function = function
        values = [argument(kind, value) for kind, value in zip(function.inputs, args, strict=True)]
        self.data = "0x" + (function.selector + encode(function.inputs, values)).hex()

    def call(self, transaction: dict[str, Any] | None = None) -> Any:
        """What it returns now; the chain stays as it is."""
        raw = self._contract.send_call({**(transaction or {}), "to": self._contract.address, "data": self.data})
        kinds = self._function.outputs
        values = [result(kind, value) for kind, value in zip(kinds, decode(kinds, raw), strict=True)]
        return values[0] if len(values) == 1 else values

    def build_transaction(self, transaction: dict[str, Any] | None = None) -> dict[str, Any]:
        """The unsigned transaction; `transaction` may give a `value` in wei."""
        return {"value": 0, **(transaction or {}), "to": self._contract.address, "data": self.data}


class Functions:
    """A contract's functions: `functions.transfer(to, 5)`, or `functions["transfer(address,uint256)"](to, 5)`."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract

    def __getattr__(self, name: str) -> Callable[..., BoundFunction]:
        return self[name]

    def __getitem__(self, name: str) -> Callable[..., BoundFunction]:
        wanted = name.replace(" ", "")

        def bind(*args: Any) -> BoundFunction:
            for function in self._contract.abi:
                if wanted in (function.name, function.signature) and len(function.inputs) == len(args):
                    return BoundFunction(self._contract, function, args)
            raise AttributeError(f"{self._contract.address} has no function {name} with {len(args)} arguments")

        return bind


class Contract:
    """One contract at an address."""

    def __init__(self, address: str, abi: list[Function], send_call: Callable[[dict[str, Any]], bytes]) -> None:
        self.address = to_checksum_address(address)
        self.abi = abi
        self.send_call = send_call
        self.functions = Functions(self)

    def encode_abi(self, name: str, args: Sequence[Any] = ()) -> str:
        """Call data of a function, as hex."""
        return self.functions[name](*args).data
