"""One request on its way through the engine, and what is said of each token it draws.

Invariant: a sequence's three lists (ids, log-probabilities, versions) grow together, one entry a token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from shoal.engine.lora import Adapter
from shoal.engine.shaping import Shaper
from shoal.engine.tokenizer import Tokenizer
from shoal.protocol.sampling import Completion, FinishReason, SampleRequest

Key = tuple[str, tuple[int, ...]]
"""Of a prompt: whose adapter, and its ids."""


@dataclass(frozen=True)
class Drawn:
    """One token as it was drawn."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, likeliest first, where the request asked for them."""


@dataclass(eq=False)
class Sequence:
    """One request on its way through the engine."""

    request: SampleRequest
    on_done: Callable[[Completion], None]
    on_token: Callable[[Drawn], None] | None = None
    shaper: Shaper | None = None
    adapter: Adapter | None = None
    """What is added to the weights for this sequence."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    cancelled: bool = False
    prompt_hidden: Tensor | None = None
    """Hidden state at the prompt's last token, [H]; from it, others with this prompt draw their first token."""
    prompt_features: Tensor | None = None
    """Where a drafter reads hidden states: those of the prompt's last positions, [T, F]."""
    prompt_version: int = -1
    """The policy version under which the prompt was computed."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.request.params.seed)

    def uniform(self) -> float:
        """This sequence's next random number: a stream of its own, so the batch's company changes nothing."""
        return self._random.random()

    def take(self, drawn: Drawn, version: int, tokenizer: Tokenizer) -> FinishReason | None:
        """Add a token, drawn under a policy version; why that ends the completion, if it does."""
        self.ids.append(drawn.token)
        self.logprobs.append(drawn.logprob)
        self.versions.append(version)
        if self.on_token is not None:
            self.on_token(drawn)
        if self.shaper is not None:
            self.shaper.took(drawn.token)
        if drawn.token in tokenizer.end_ids or tokenizer.ends_with_stop(self.ids, self.request.params.stop):
            return "stop"
        if self.shaper is not None and (self.shaper.is_broken or self.shaper.is_complete):
            return "error" if self.shaper.is_broken else "stop"
        return "length" if len(self.ids) >= self.request.params.max_tokens else None

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def space(self) -> str:
        """Sequences of one space, which is an adapter's name, may share what was computed of equal beginnings."""
        return self.adapter.name if self.adapter else ""

    @property
    def key(self) -> Key:
        """Equal for sequences whose prompts are computed alike."""
        return self.space, self.prompt

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Positions filled in the cache: every token but the newest, which the next pass will write."""
        return self.prompt_length + max(0, len(self.ids) - 1)

    @property
    def most_tokens(self) -> int:
        return self.prompt_length + self.request.params.max_tokens
