"""What an agent did in a quest, as the judge needs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shoal.envs.evm.chain import Receipt


@dataclass(frozen=True, slots=True)
class Asked:
    """One query: callee and call data, or a function of the chain itself and its arguments."""

    to: str
    data: bytes
    after: int
    """How many transactions had been sent before it."""


@dataclass
class Record:
    receipts: list[Receipt] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
