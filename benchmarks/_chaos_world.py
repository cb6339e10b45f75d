"""Arithmetic that takes its time, so that a tiny model's run doesn't take the whole machine."""

from __future__ import annotations

import asyncio

from shoal.envs.arithmetic import Arithmetic
from shoal.envs.base import Step

STEP_S = 0.25


class SlowArithmetic(Arithmetic):
    """Each answer is judged after a while, also when the coordinator plays it again."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        await asyncio.sleep(STEP_S)
        return await super().step(action, truncated=truncated)
