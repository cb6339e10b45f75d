"""`[serving.speculation]`: what drafts, and which drafts stay.

The rule comes in kinds, told apart by `type`, so that a threshold cannot be given to a rule that has none.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from shoal.config.base import Section, default_kind

Share = Annotated[float, Field(ge=0, le=1)]


class StrictRule(Section):
    """Lossless: what comes out is distributed as what the model alone would say."""

    type: Literal["strict"] = "strict"
    """`strict`, `margin`, `semantic`, `typical` or `fly`; all but `strict` change what is said."""


class MarginRule(Section):
    """Relaxed where the model hardly prefers its likeliest token to the second."""

    type: Literal["margin"] = "margin"
    """`strict`, `margin`, `semantic`, `typical` or `fly`; all but `strict` change what is said."""
    theta: float | None = Field(default=None, ge=0)
    """The threshold; absent: what was calibrated for the model, else 0.9."""
    form: Literal["logits", "ratio", "difference"] | None = None
    """What theta is compared with: z2/z1 (the paper's), p2/p1, or z1 - z2; absent: as calibrated, else `logits`."""


class SemanticRule(Section):
    """Lenient where model and drafter agree about what kind of position it is."""

    type: Literal["semantic"] = "semantic"
    """`strict`, `margin`, `semantic`, `typical` or `fly`; all but `strict` change what is said."""
    tau: Share | None = None
    """Share of the drafter's distribution at such positions; absent: what was calibrated for the model, else 0.3."""
    entropy_nats: float = Field(default=1.0, ge=0)
    """Entropies that differ by more make a token key, and a key token is judged strictly."""
    top1: Share = 0.3
    """The same of the largest probabilities."""
    distance: Share = 0.5
    """The same of the distributions' total variation."""


class TypicalRule(Section):
    """Accepts what the model finds plausible (Medusa's rule)."""

    type: Literal["typical"] = "typical"
    """`strict`, `margin`, `semantic`, `typical` or `fly`; all but `strict` change what is said."""
    epsilon: Share = 0.09
    """No token above this probability is refused."""
    delta: float = Field(default=0.3, ge=0)
    """Nor one above this times e to the minus entropy."""


class FlyRule(Section):
    """Forgives a lone refusal in doubt, if the drafts after it fit."""

    type: Literal["fly"] = "fly"
    """`strict`, `margin`, `semantic`, `typical` or `fly`; all but `strict` change what is said."""
    window: int = Field(default=3, ge=1, le=16)
    """Drafts that must follow and be accepted."""
    entropy_nats: float = Field(default=0.3, ge=0)
    """The doubt: entropy over the likeliest tokens."""
    top_k: int = Field(default=3, ge=2, le=64)
    """How many of them."""


AcceptanceRule = Annotated[
    StrictRule | MarginRule | SemanticRule | TypicalRule | FlyRule,
    Field(discriminator="type"),
    BeforeValidator(default_kind("type", "strict")),
]


class Speculation(Section):
    """`[serving.speculation]`: several tokens for one pass of the model."""

    draft: str = ""
    """`ngram` (looks up what the text has said before), a head's folder, or a smaller model with the same tokenizer;
    empty: no speculation."""
    most: int = Field(default=8, ge=1, le=16)
    """Most tokens drafted for one pass; how many it really are is measured, none where that pays best."""
    tree_width: int = Field(default=1, ge=1, le=8)
    """Tokens proposed at each depth; 1 gives chains."""
    rule: AcceptanceRule = StrictRule()
    """Which drafts stay."""
