"""What happened on the chain, in words for people: calls, events, and what the agent holds.

Nothing here is judged; what cannot be read is shown as the bytes that it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from shoal.envs.evm.abi import AbiError, Function, decode, interfaces, known_functions
from shoal.envs.evm.chain import ChainBackend, Log, Transaction
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.judging import WATCHED
from shoal.envs.evm.language import ETHER, World, plain
from shoal.envs.evm.record import Asked

MAX_WORDS_CHARS = 2_000
SMALLEST_ETHER = ETHER // 10**6
"""Numbers from here on are taken for amounts and shown in whole coins; times and ids are smaller."""


def call_words(transaction: Transaction) -> str:
    """A transaction as it would be written down: `USDT.approve(router, 5 ether)`."""
    value = f" with {number_words(transaction.value)} BNB" if transaction.value else ""
    to = place(transaction.to)
    if not transaction.data:
        return f"pay {to}{value or ' nothing'}"
    return f"{to}{_inside(transaction.data)}{value}"[:MAX_WORDS_CHARS]


def asked_words(asked: Asked) -> str:
    """A query."""
    if not asked.to.startswith("0x"):
        return f"{asked.to}({asked.data.decode(errors='replace')})"
    return f"{place(asked.to)}{_inside(asked.data)}"[:MAX_WORDS_CHARS]


def event_words(log: Log) -> str:
    """An event: `USDT.Transfer(me, 0x…, 5 ether)`."""
    kind = load_genesis().kinds.get(log.address)
    for event in interfaces()[kind].events.values() if kind else ():
        if log.topics[:1] == (event.topic,):
            values = ", ".join(_value(value) for value in event.values(log.topics, log.data))
            return f"{place(log.address)}.{event.name}({values})"[:MAX_WORDS_CHARS]
    return f"{place(log.address)} 0x{b''.join(log.topics).hex()}"[:MAX_WORDS_CHARS]


def holdings(chain: ChainBackend, values: dict[str, Any]) -> dict[str, int]:
    """What the agent holds, in base units, by name."""
    world = World(chain, values)
    found = {}
    for name, read in WATCHED.items():
        try:
            found[name] = int(world.evaluate(read))
        except AbiError:
            continue  # the contract is not as it was: there is nothing to show
    return found


def place(address: str) -> str:
    """An address by its name, where it has one."""
    return _names().get(address, address)


def number_words(number: int) -> str:
    """A number of base units, in whole coins where it is that large."""
    if abs(number) < SMALLEST_ETHER:
        return str(number)
    if number >= 2**255:
        return "unlimited"
    whole, rest = divmod(abs(number), ETHER)
    text = f"{whole}.{rest:018d}".rstrip("0").rstrip(".")
    return f"{'-' if number < 0 else ''}{text}"


def _inside(data: bytes) -> str:
    function = _by_selector().get(data[:4])
    if function is not None:
        try:
            values = decode(function.inputs, data[4:])
        except AbiError:
            return f" 0x{data.hex()}"
        return f".{function.signature.partition('(')[0]}({', '.join(_value(plain(value)) for value in values)})"
    return f" 0x{data.hex()}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        whole = number_words(value)
        return whole if whole in (str(value), "unlimited") else f"{whole} ether"
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    text = str(value)
    return place(text.lower()) if text.startswith("0x") and len(text) == 42 else f"'{text}'"


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    return {address: name for name, address in load_genesis().names.items()} | {AGENT: "me"}


@lru_cache(maxsize=1)
def _by_selector() -> dict[bytes, Function]:
    return {function.selector: function for function in known_functions().values()}
