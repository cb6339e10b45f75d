"""New weights under sequences that are alive: what becomes of them, by the engine's swap policy.

    keep        they go on with the cache they have; it is of the old weights up to the swap
    recompute   their cache is computed again under the new weights, and they go on with that
    finish      they end first under the old weights; nothing is admitted until they have

In each case a token carries the version of the weights that drew it, so an episode's staleness, that of its oldest
token, is right whatever the policy. `keep` costs nothing and draws its next tokens from neither policy exactly;
`recompute` costs a prefill of all that is alive; `finish` costs the steps in which fewer and fewer sequences are alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shoal.engine.batching import Batcher
from shoal.engine.prefill import PREFILL_WIDTH
from shoal.errors import ModelError
from shoal.protocol.sampling import SwapPolicy


def swap(
    batcher: Batcher,
    version: int,
    tensors: Mapping[str, Tensor],
    policy: SwapPolicy,
    done: Callable[[float | ModelError], None],
) -> None:
    """Put new weights in place, now or as soon as the policy allows.

    Args:
        done: told the pause in seconds, or why the weights do not fit the model, whose old ones then stay.
    """
    if policy == "finish" and (batcher.live or batcher.num_filling):
        earlier = batcher.held_swap

        def held() -> None:
            if earlier is not None:
                earlier()  # whoever waits for it is answered as well
            swap(batcher, version, tensors, policy, done)

        batcher.held_swap = held
        return
    started = time.monotonic()
    try:
        batcher.model.load(tensors)
    except ModelError as error:
        done(error)
        return
    batcher.swapped(version)
    if policy == "recompute":
        recompute(batcher)
    done(time.monotonic() - started)


@torch.inference_mode()
def recompute(batcher: Batcher) -> None:
    """Compute the cache of everything alive again, with the weights in place."""
    model, cache, live = batcher.model, batcher.cache, batcher.live
    rows = max(1, batcher.prefill_tokens // PREFILL_WIDTH)
    for first in range(0, len(live), rows):
        part = live[first : first + rows]
        known = [[*s.prompt, *s.ids][: s.length] for s in part]
        longest = max(map(len, known))
        for at in range(0, longest, PREFILL_WIDTH):
            width = min(PREFILL_WIDTH, longest - at)
            ids = [[*row[at : at + width], *[0] * (at + width - max(at, len(row)))][:width] for row in known]
            start = torch.full((len(part),), at, device=model.device)
            adapters = [s.adapter for s in part]
            model.forward(torch.tensor(ids, device=model.device), start, cache, first, adapters=adapters)
