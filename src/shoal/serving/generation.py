"""Choices from the engine: a request's prompts and parameters in, pieces of text and whole completions out.

Invariants: when the consumer leaves (the client went, the time is over), every choice's slot in the engine is freed;
choice i of a seeded request is drawn with seed + i, so the same request gives the same choices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from shoal.engine.sequence import Drawn
from shoal.engine.shaping import PLAIN, Shaping
from shoal.engine.text_stream import TextStream
from shoal.errors import CapacityError, ModelError, RecordError
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.serving.backend import Engine
from shoal.serving.errors import ApiError, bad_request

RETRY_S = 5
"""When to ask again where the engine can't go on."""

MAX_SEED = 2**63
"""Seeds travel as signed 64-bit integers."""


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks the engine for."""

    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    choices: int = 1
    """Of each prompt."""
    shaping: Callable[[], Shaping] = lambda: PLAIN
    """Makes one choice's shaping: a constraint is advanced by its own tokens."""

    @property
    def size(self) -> int:
        return len(self.prompts) * self.choices

    def request(self, index: int) -> SampleRequest:
        """The engine's request for choice `index`; a prompt's choices follow each other."""
        seed = self.params.seed
        if seed is not None:
            seed = (seed + index % self.choices) % MAX_SEED
        return SampleRequest(self.prompts[index // self.choices], msgspec.structs.replace(self.params, seed=seed))


@dataclass(frozen=True)
class Piece:
    """What came of one choice: text with its tokens, and at its end the whole."""

    choice: int
    text: str
    drawn: tuple[Drawn, ...]
    """Without the token that ends the completion."""
    completion: Completion | None = None
    ids: tuple[int, ...] = ()
    """With it."""


def check(engine: Engine, job: Job) -> None:
    """Raise an `ApiError` if the engine could never serve this."""
    try:
        for index in range(0, job.size, job.choices):
            engine.check(job.request(index))
    except CapacityError as error:
        raise bad_request(str(error), code="context_length_exceeded") from None
    except RecordError as error:
        raise bad_request(str(error)) from None
    except ModelError as error:
        raise ApiError(503, str(error), code="no_stages", retry_after_s=RETRY_S) from None


async def pieces(engine: Engine, job: Job) -> AsyncGenerator[Piece]:
    """All choices' pieces as they come; those of one choice in order, the one with its completion last."""
    arrived: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()  # bounded by size × max_tokens

    async def follow(index: int) -> None:
        async with aclosing(_choice(engine, job, index)) as found:
            async for piece in found:
                arrived.put_nowait(piece)

    tasks = [asyncio.create_task(follow(index)) for index in range(job.size)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    try:
        running = job.size
        while running:
            piece = await arrived.get()
            if isinstance(piece, Piece):
                yield piece
                continue
            running -= 1
            try:
                piece.result()
            except ModelError as error:
                why = engine.trouble or "The engine cannot go on with this."
                raise ApiError(503, why, code="engine_error", retry_after_s=RETRY_S) from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(engine: Engine, job: Job) -> list[tuple[Completion, tuple[Drawn, ...]]]:
    """Each choice's completion with its tokens, in order."""
    drawn: list[list[Drawn]] = [[] for _ in range(job.size)]
    done: dict[int, Completion] = {}
    async with aclosing(pieces(engine, job)) as found:
        async for piece in found:
            drawn[piece.choice] += piece.drawn
            if piece.completion is not None:
                done[piece.choice] = piece.completion
    return [(done[index], tuple(drawn[index])) for index in range(job.size)]


async def _choice(engine: Engine, job: Job, index: int) -> AsyncGenerator[Piece]:
    request = job.request(index)
    text = TextStream(engine.tokenizer, request.params.stop)
    held: list[Drawn] = []
    ids: list[int] = []
    async with aclosing(engine.draws(request, job.shaping())) as draws:
        async for drawn in draws:
            if isinstance(drawn, Completion):
                if drawn.finish in ("error", "cancelled"):
                    raise ModelError(f"a completion ended with '{drawn.finish}'.")
                yield Piece(index, text.rest(drawn.text), tuple(held), drawn, tuple(ids))
                return
            ids.append(drawn.token)
            if drawn.token not in engine.tokenizer.end_ids:
                held.append(drawn)
            if piece := text.push(drawn.token):
                yield Piece(index, piece, tuple(held), ids=tuple(ids))
                held, ids = [], []
