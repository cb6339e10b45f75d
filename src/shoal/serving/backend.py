"""What the server needs of whatever draws its tokens: the local engine, or the one over a pipeline of stages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from shoal.engine.grammar import Grammars
from shoal.engine.sequence import Drawn
from shoal.engine.shaping import Shaping
from shoal.engine.stats import EngineStats
from shoal.engine.tokenizer import Tokenizer
from shoal.protocol.sampling import Completion, SampleRequest


class Engine(Protocol):
    """One model's tokens."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def grammars(self) -> Grammars: ...

    @property
    def version(self) -> int:
        """Of the weights in place."""

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and completion together."""

    @property
    def is_alive(self) -> bool:
        """Whether it will ever answer again."""

    @property
    def trouble(self) -> str:
        """Why requests can't be answered at the moment; empty where they can."""

    @property
    def lossy_rule(self) -> str:
        """The acceptance rule of drafts, where it may change what the weights would have said; else empty."""

    def stats(self) -> EngineStats:
        """Counters since it started."""

    def check(self, request: SampleRequest) -> None:
        """Raise what would be raised for a request that can't be served."""

    def draws(self, request: SampleRequest, shaping: Shaping) -> AsyncGenerator[Drawn | Completion]:
        """Each token as soon as it is drawn, and last the completion."""

    async def close(self) -> None:
        """End it."""
