"""`[loop]`: how `shoal loop` puts all parts to work on one machine, how long, and how it is measured."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from shoal.config.base import Section


class Loop(Section):
    """`[loop]`: the whole at once (docs/loop.md): training, serving, memory and a collective, measured before and
    after."""

    minutes: float = Field(default=30.0, gt=0, le=7 * 24 * 60)
    """The whole takes about so long, both measurements included; training gets what they leave."""
    questions: int = Field(default=160, ge=1)
    """Held-out questions of each environment, asked before and after."""
    notes: int = Field(default=160, ge=0)
    """Questions of each environment that are asked once more afterwards, with what is remembered, where anything is."""
    problems: int = Field(default=16, ge=0, le=10_000)
    """Held-out problems that the collective solves before and after."""
    planners: int = Field(default=2, ge=1, le=32)
    """Chains of steps for each problem."""
    problem_timeout_s: float = Field(default=90.0, gt=0, le=3600)
    """A problem that has no answer by then has none."""
    at_once: int = Field(default=4, ge=1, le=256)
    """Problems that the collective works on at once while it is measured."""
    practice: int = Field(default=8, ge=0, le=1000)
    """Exercises of each skill of each expert before training begins: what was right is in the stream from its first
    step on."""
    practice_every_s: float = Field(default=10.0, gt=0)
    """Between two exercises or problems while training goes on."""
    steps_weight: float = Field(default=0.3, ge=0)
    """Weight of the collective's own steps among the environments; 0: they train nothing."""
    learn_every_s: float = Field(default=150.0, gt=0)
    """How often candidates for memory are taken from what has just been trained on."""
    candidates: int = Field(default=3, ge=1, le=64)
    """New candidates each time, at most: each costs trials."""
    request_every_s: float = Field(default=5.0, gt=0)
    """Between two requests that a client sends to the server while training goes on."""
    experts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """`[loop.experts.NAME]`: the collective's experts on this machine, as in a file of experts (docs/collective.md),
    all of them the policy that is trained."""
