"""A world in which a rollout takes a set time on a worker, for `_bill`: what a machine is worth is then known.

Imported as `_priced` by the processes of a run. `PRICED_ROLLOUT_S` is set in workers alone: whoever plays an episode
again, to verify it, need not wait.
"""

from __future__ import annotations

import asyncio
import os

from _paced import FirstDigit
from shoal.envs.base import Step


class Slow(FirstDigit):
    """A reply that begins with a digit earns 1, after a while."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        await asyncio.sleep(float(os.environ.get("PRICED_ROLLOUT_S", "0")))
        return await super().step(action, truncated=truncated)
