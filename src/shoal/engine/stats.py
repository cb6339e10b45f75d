"""What an engine counts, for people, metrics and rates."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.batching import Batcher


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine started; rates are the caller's to compute."""

    tokens_drawn: int
    prompt_tokens: int
    live: int
    waiting: int
    busy_s: float
    cache_bytes: int
    filling: int
    """Sequences whose prompts are being computed."""
    reused_tokens: int
    """Prompt tokens that the prefix store saved; `prompt_tokens` does not count them."""
    prefix_bytes: int
    rebuilt_tokens: int = 0
    """Computed again because a pipeline's stages were lost or its layers moved."""
    rounds: int = 0
    """Passes with drafts, counted once for each sequence."""
    drafted: int = 0
    """Tokens that drafters proposed, along the deepest branch."""
    accepted: int = 0
    """Of those, the ones that stayed."""


def stats_of(batcher: Batcher, busy_s: float) -> EngineStats:
    """A batcher's numbers now."""
    speculation = batcher.speculation
    return EngineStats(
        tokens_drawn=batcher.tokens_drawn,
        prompt_tokens=batcher.prompt_tokens,
        live=len(batcher.live),
        waiting=len(batcher.waiting),
        busy_s=busy_s,
        cache_bytes=batcher.cache.bytes,
        filling=batcher.num_filling,
        reused_tokens=batcher.reused_tokens,
        prefix_bytes=batcher.prefixes.bytes if batcher.prefixes else 0,
        rounds=speculation.rounds if speculation else 0,
        drafted=speculation.drafted if speculation else 0,
        accepted=speculation.accepted if speculation else 0,
    )
