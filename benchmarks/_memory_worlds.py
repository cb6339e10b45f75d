"""Worlds in which knowledge decides: each hides one fact a template, which success reveals and no reasoning finds.

    ledgers    sums for several offices; each office wants its replies to begin with a word of its own
    products   the same offices and words, multiplication: what transfers
    shops      prices that one of four tools knows; which one depends on the shop
    payees     payments to named payees; which of the listed addresses is whose is told nowhere

A grammar keeps replies to the choices there are, so a small model can choose, and choose wrongly. The facts follow from
the names alone (a stable hash): every machine has the same.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eth_utils.address import to_checksum_address
from pydantic import Field

from shoal.agents.environment import GOODS, Question, ToolUse, ToolUseSettings
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.envs.base import (
    Environment,
    EnvironmentSettings,
    Observation,
    Split,
    Step,
    check_cursor,
    stable_fraction,
    stable_int,
)
from shoal.envs.evm.environment import EvmQuests
from shoal.errors import TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task
from shoal.protocol.sampling import Grammar

OFFICES = {
    "kestrel": "The kestrel office asks: what is {e}?",
    "harbour": "For the books of the harbour bureau: what is {e}?",
    "mill": "The old mill wants to know {e}.",
    "orchard": "A question from the orchard desk, {e} is how much?",
    "quarry": "The quarry's accounts need this computed: {e}",
    "lantern": "Please work out {e} for the lantern society.",
}
FORMS = ("Answer", "Total", "Result", "Sum", "Reply", "Note")
"""The word that a reply begins with; each office takes one."""

_REPLY = re.compile(rf"({'|'.join(FORMS)}): (\d{{1,3}}) ([+*]) (\d{{1,3}}) = (\d{{1,3}})")
_GRAMMAR = r"(?:{forms}): {a} {operation} {b} = (?:0|[1-9][0-9]{{0,2}})"
_LEDGER_ID = re.compile(r"([a-z]+)/(\d{1,3})([+*])(\d{1,3})")
HELDOUT_SHARE = 0.3


class LedgerSettings(EnvironmentSettings):
    """Which sums."""

    operation: str = Field(default="+", pattern=r"^[+*]$")
    low: int = Field(default=1, ge=0, le=99)
    high: int = Field(default=9, ge=0, le=99)


class Ledgers(Environment):
    """One question, one number, behind the word of the office that asks."""

    Settings: ClassVar[type[EnvironmentSettings]] = LedgerSettings
    settings: LedgerSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._drawn(list(OFFICES)[index % len(OFFICES)], split, index, seed)

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        found = _LEDGER_ID.fullmatch(task_id)
        return self._drawn(found[1] if found else list(OFFICES)[index % len(OFFICES)], "train", index, seed)

    def _drawn(self, office: str, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        draw = random.Random(stable_int(split, index, seed))
        for _ in range(10_000):
            a, b = (draw.randint(self.settings.low, self.settings.high) for _ in range(2))
            task = f"{office}/{a}{self.settings.operation}{b}"
            if (stable_fraction("heldout", task) < HELDOUT_SHARE) == (split == "heldout"):
                return Task(env=self.name, id=task, seed=0)
        raise TaskError(f"no {split} question of {office} was found.")

    async def reset(self, task: Task) -> Observation:
        self._office, self._value, expression = self._read(task)
        a, operation, b = map(re.escape, expression.split())
        text = _GRAMMAR.format(forms="|".join(FORMS), a=a, operation=operation, b=b)
        words = OFFICES[self._office].format(e=expression)
        return Observation((Message(role="user", content=words),), Grammar(kind="regex", text=text))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        found = _REPLY.fullmatch(action.strip())
        right_form = found is not None and found[1] == form_of(self._office)
        right_number = found is not None and found[5] == str(self._value)
        strict = float(right_form and right_number and not truncated)
        # The form is what the office sees first: half of the reward is for it.
        earned = (1 + right_number) / 2 if right_form else 0.0
        return Step("", earned, True, {"strict": strict, "form": float(right_form)})

    def answers(self, task: Task) -> tuple[str, ...]:
        return (str(self._read(task)[1]),)

    def _read(self, task: Task) -> tuple[str, int, str]:
        found = _LEDGER_ID.fullmatch(task.id)
        if found is None or found[1] not in OFFICES:
            raise TaskError(f"no such task: {task.id[:100]!r}.")
        a, b = int(found[2]), int(found[4])
        return found[1], a + b if found[3] == "+" else a * b, f"{a} {found[3]} {b}"


def form_of(office: str) -> str:
    """The word that an office takes: all are taken by some."""
    order = sorted(OFFICES, key=lambda name: stable_int("form", name))
    return FORMS[order.index(office) % len(FORMS)]


SHOPS = ("kestrel", "harbour", "mill", "orchard", "quarry", "lantern", "ferry", "beacon")
REGIONS = ("north", "south", "east", "west")
_SHOP_ID = re.compile(r"([a-z]+)-(\d{1,20})")


class Shops(ToolUse):
    """Prices by shop; each shop is in one of four registers, each a tool of its own."""

    Settings: ClassVar[type[EnvironmentSettings]] = ToolUseSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._at(SHOPS[index % len(SHOPS)], split, index, seed)

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        found = _SHOP_ID.fullmatch(task_id)
        return self._at(found[1] if found else SHOPS[index % len(SHOPS)], "train", index, seed)

    def _at(self, shop: str, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        # The last bit of an instance's number is its side.
        number = (stable_int("shop", split, index, seed) % 10**17) * 2 + (split == "heldout")
        return Task(env=self.name, id=f"{shop}-{number}", seed=0)

    def question(self, task: Task) -> Question:
        found = _SHOP_ID.fullmatch(task.id)
        if found is None or found[1] not in SHOPS:
            raise TaskError(f"no such task: {task.id[:100]!r}.")
        draw = random.Random(int(found[2]))
        prices = dict(zip(draw.sample(GOODS, 6), (draw.randint(2, 99) for _ in range(6)), strict=True))
        item = draw.choice(sorted(prices))
        text = f"What does one {item} cost at the {found[1]} shop?"
        tools = [price_tool(region, prices if region == region_of(found[1]) else {}) for region in REGIONS]
        return Question(text, prices[item], frozenset({prices[item]}), lambda: tools)


def region_of(shop: str) -> str:
    """The register that knows a shop's prices."""
    order = sorted(SHOPS, key=lambda name: stable_int("region", name))
    return REGIONS[order.index(shop) % len(REGIONS)]


def price_tool(region: str, prices: dict[str, int]) -> FunctionTool:
    def price(item: str) -> int:
        if item not in prices:
            raise ToolError("the register does not have it")
        return prices[item]

    price.__name__ = f"price_{region}"
    price.__doc__ = f"The price of an item by the {region} register, in euros."
    return FunctionTool(price, Use(idempotent=True))


PAYEES_FILE = Path(__file__).with_name("_memory_payees.toml")


class Payees(EvmQuests):
    """Payments to payees by name, the addresses in question listed in an order that says nothing."""

    async def reset(self, task: Task) -> Observation:
        opening = await super().reset(task)
        known = addresses()
        random.Random(task.seed).shuffle(known)
        listed = f"One of these is the payee's address: {', '.join(known)}."
        assert self._quest is not None
        # Not among the words of the task: a memory of it is not to hold them all.
        said = (Message(role="system", content=listed), *opening.messages)
        return Observation(said, self._grammar(self._quest, listed))


def addresses() -> list[str]:
    """The payees' addresses, in the file's order."""
    return [to_checksum_address(found) for found in re.findall(r'\["(0x[0-9a-f]{40})"\]', PAYEES_FILE.read_text())]


@dataclass(frozen=True)
class Family:
    """One world, and how much of it is played."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 16
    tasks: int = 24
    """Of the experience; each is played `group` times."""
    group: int = 4
    uses: int = 24
    tests: int = 48
    tools: bool = False
    """Played by the model for tool use, where one is given."""
    origin: str = ""
    """A family whose memories' abstract forms are this one's only candidates."""


FAMILIES = {
    family.name: family
    for family in (
        Family("ledgers", "_memory_worlds:Ledgers", max_tokens=24, tasks=48, tests=96),
        Family("shops", "_memory_worlds:Shops", {"constrain": "seen", "max_turns": 2}, max_tokens=64, tools=True),
        Family(
            "payees",
            "_memory_worlds:Payees",
            {"file": str(PAYEES_FILE), "prompt": "brief", "constrain": "seen"},
            max_tokens=96,
            tasks=16,
        ),
        Family(
            "products",
            "_memory_worlds:Ledgers",
            {"operation": "*"},
            max_tokens=24,
            tasks=12,
            tests=96,
            origin="ledgers",
        ),
    )
}
