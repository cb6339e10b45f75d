"""One lease at work in a worker, and the sampler of its own episodes: so what is drawn for it can be told apart.

Invariant: `progress` grows only by tokens that were drawn for it, or as its owner counts what it fetched for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from shoal.engine.local import LocalEngine
from shoal.engine.sequence import Drawn
from shoal.engine.shaping import Shaping
from shoal.errors import ModelError
from shoal.protocol.sampling import Completion, SampleRequest
from shoal.protocol.work import Lease
from shoal.rollout.vllm_engine import VllmEngine


@dataclass
class Job:
    """A lease, its task, and how far it is."""

    lease: Lease
    engine: LocalEngine | VllmEngine
    on_failure: Callable[[ModelError], None]
    progress: int = 0
    num_drawing: int = 0
    """Its requests in the engine."""
    num_programs: int = 0
    """Agent programs that act for it; their own deadline bounds them."""
    acting: bool = False
    task: asyncio.Task[None] | None = None

    async def sample(self, request: SampleRequest) -> Completion:
        self.num_drawing += 1
        try:
            completion = await self.engine.sample(request)
        except ModelError as error:
            self.on_failure(error)
            raise
        finally:
            self.num_drawing -= 1
        self.progress += len(completion.token_ids)
        return completion

    async def draws(self, request: SampleRequest, shaping: Shaping) -> AsyncGenerator[Drawn | Completion]:
        """As `sample`, token by token: for agent programs, which a worker has only beside an engine of its own."""
        assert isinstance(self.engine, LocalEngine)
        self.num_drawing += 1
        try:
            async with aclosing(self.engine.draws(request, shaping)) as found:
                async for drawn in found:
                    if isinstance(drawn, Completion):
                        self.progress += len(drawn.token_ids)
                    yield drawn
        except ModelError as error:
            self.on_failure(error)
            raise
        finally:
            self.num_drawing -= 1
