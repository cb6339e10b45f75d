"""What a request may ask of the logits besides temperature and truncation: which adapter makes them, a grammar, biases,
penalties, alternatives.

Invariant: shaping comes before temperature and sampling, so a reported log-probability is that of the distribution
the token was really drawn from; a token that the grammar forbids is never drawn.

Penalties are OpenAI's: z[t] − count(t) · frequency − (count(t) > 0) · presence, over the completion's own tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shoal.engine.grammar import Constraint


@dataclass(frozen=True)
class Shaping:
    """A request's wishes; the default asks for nothing."""

    constraint: Constraint | None = None
    """What the completion must match; of this request alone, since it is advanced with each token."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_top: int = 0
    """Alternatives reported with each token."""
    adapter: str = ""
    """What is added to the weights, by name; empty: nothing."""

    def shaper(self) -> Shaper | None:
        """The state that goes along with one sequence; none where there is nothing to do to its logits."""
        return None if replace(self, adapter="") == PLAIN else Shaper(self)


PLAIN = Shaping()

FEW = 8
"""A grammar that leaves at most this part of the vocabulary (1 / 8) leaves few tokens."""


class Shaper:
    """One sequence's shaping."""

    def __init__(self, shaping: Shaping) -> None:
        self.num_top = shaping.num_top
        self._constraint = shaping.constraint
        self._bias = shaping.bias
        self._presence, self._frequency = shaping.presence_penalty, shaping.frequency_penalty
        self._counts: Counter[int] = Counter()

    @torch.inference_mode()
    def apply(self, logits_V: Tensor) -> None:
        """Change fp32 logits in place, for the token that comes next."""
        device = logits_V.device
        added = dict(self._bias)
        if self._presence or self._frequency:
            for token, count in self._counts.items():
                added[token] = added.get(token, 0.0) - count * self._frequency - self._presence
        if added:
            logits_V[torch.tensor(list(added), device=device)] += torch.tensor(list(added.values()), device=device)
        if self._constraint is not None:
            forbidden = ~self._constraint.allowed(logits_V.shape[-1])
            logits_V.masked_fill_(forbidden.to(device), float("-inf"))

    def candidates(self, vocab_size: int) -> Tensor | None:
        """The only tokens that can be drawn next, ascending, where a grammar leaves few and nothing else is asked."""
        if self._constraint is None or self._bias or self._presence or self._frequency:
            return None
        return self._constraint.few(vocab_size, vocab_size // FEW)

    def took(self, token: int) -> None:
        """Tell of the token that was drawn."""
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.took(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end could follow."""
        return self._constraint is not None and self._constraint.is_complete

    @property
    def is_broken(self) -> bool:
        """Whether the grammar went past its limits, so that nothing more can be said about what may follow."""
        return self._constraint is not None and self._constraint.error != ""
