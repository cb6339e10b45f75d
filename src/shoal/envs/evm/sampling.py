"""An instance of a task: a seed's parameters and the instruction that names them.

Invariant: the same task and seed give the same parameters and words on every machine, whatever was drawn before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from random import Random
from typing import Any

from eth_utils.address import to_checksum_address

from shoal.envs.base import stable_int
from shoal.envs.evm.definition import (
    AddressParameter,
    AmountParameter,
    ContractParameter,
    Definition,
    GivenParameter,
    NumberParameter,
    Parameter,
)
from shoal.envs.evm.genesis import load_genesis
from shoal.envs.evm.language import ETHER

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "


@dataclass(frozen=True)
class Instance:
    """One task to do."""

    definition: Definition
    seed: int
    values: Mapping[str, Any]
    """Parameter -> value as the language has it: amounts in wei, addresses in lower case."""
    instruction: str


def sample(definition: Definition, seed: int) -> Instance:
    """The instance that `seed` selects."""
    values: dict[str, Any] = {}
    words = dict(_contract_words())
    for name, parameter in definition.parameters.items():
        rng = Random(stable_int("evm", definition.id, seed, name))
        values[name], words[name] = _draw(parameter, rng)
        if isinstance(values[name], str) and values[name].startswith("0x"):
            words[f"{name}_address"] = to_checksum_address(values[name])
    template = Random(stable_int("evm", definition.id, seed, "#template")).choice(definition.templates)
    return Instance(definition, seed, values, template.format_map(words))


@lru_cache(maxsize=1)
def _contract_words() -> dict[str, str]:
    """Name of a contract -> its address as an instruction says it."""
    return {name: to_checksum_address(address) for name, address in load_genesis().names.items()}


def _draw(parameter: Parameter, rng: Random) -> tuple[Any, str]:
    """A value, and how an instruction says it."""
    if isinstance(parameter, AddressParameter):
        address = f"0x{rng.getrandbits(160):040x}"
        return address, to_checksum_address(address)
    if isinstance(parameter, AmountParameter):
        low, high = Decimal(parameter.low), Decimal(parameter.high)
        drawn = low + (high - low) * Decimal(rng.getrandbits(53)) / Decimal(2**53)
        amount = drawn.quantize(Decimal(1).scaleb(-parameter.decimals), ROUND_HALF_UP)
        return int(amount * ETHER), f"{amount:f}"
    if isinstance(parameter, NumberParameter):
        number = rng.randrange(parameter.low, parameter.high + 1, parameter.step)
        return number, str(number)
    if isinstance(parameter, ContractParameter):
        name = rng.choice(parameter.values)
        return load_genesis().names[name], name
    if isinstance(parameter, GivenParameter):
        address = rng.choice(parameter.values)
        return address.lower(), to_checksum_address(address)
    text = rng.choice(parameter.values) if parameter.values else ""
    if parameter.length:
        # Neither end is a space: an instruction could not show it.
        inner = "".join(rng.choice(LETTERS) for _ in range(parameter.length - 2))
        text = rng.choice(LETTERS[:-1]) + inner + rng.choice(LETTERS[:-1])
    return text, text
