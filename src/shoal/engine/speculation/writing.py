"""The text that a drafter learns from: what its target answers to prompts, written down as token ids.

Invariants: an answer is in the file once, however often writing is interrupted and gone on with; a line that a kill cut
short is written anew; with temperature 0 no prompt is asked twice, since its answer would be the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.engine.local import LocalEngine
from shoal.errors import RecordError
from shoal.protocol.chat import Message
from shoal.protocol.codec import Record, read_jsonl, to_json
from shoal.protocol.sampling import MAX_PROMPT_TOKENS, SampleRequest, SamplingParams

SAY_EVERY_S = 5.0


class TargetText(Record, frozen=True):
    """One completion of the target's."""

    index: int
    """Of the prompt it answers, counted on where prompts are asked again: what a resumed writing goes on from."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    def check(self) -> None:
        if not self.prompt_ids or len(self.prompt_ids) + len(self.token_ids) > MAX_PROMPT_TOKENS:
            raise RecordError("a text of the target has no prompt, or is too long.")
        if min(self.prompt_ids + self.token_ids) < 0 or self.index < 0:
            raise RecordError("a text of the target has a negative token id or index.")


@dataclass(frozen=True)
class Writing:
    """What is to be written.

    Args:
        tokens: stop once there are so many.
        max_tokens: of one answer.
        context_tokens: of prompt and answer together; a prompt that leaves no room is left out.
        seed: an answer's own is this and its index.
        in_flight: answers under way at once.
    """

    tokens: int
    max_tokens: int
    context_tokens: int
    temperature: float
    seed: int
    in_flight: int


def written(path: Path) -> list[TargetText]:
    """What is there already; a line cut short is removed."""
    texts = list(read_jsonl(path, TargetText)) if path.exists() else []
    path.write_bytes(b"".join(to_json(text) + b"\n" for text in texts))
    return texts


def missing(texts: Sequence[TargetText], num_prompts: int, writing: Writing) -> Iterator[int]:
    """Indices still to be answered, lowest first: without end where sampling makes every answer another."""
    done = {text.index for text in texts}
    index = 0
    while index < num_prompts or writing.temperature > 0:
        if index not in done:
            yield index
        index += 1


async def write(
    engine: LocalEngine,
    prompts: Sequence[Sequence[Message]],
    path: Path,
    texts: list[TargetText],
    writing: Writing,
    progress: Callable[[str], None],
) -> None:
    """Let the model answer until there are enough tokens or no prompts; adds to `texts` and to the file.

    The caller owns the engine. On cancellation, answers under way are dropped.
    """
    fitting = [ids for ids in (tuple(engine.tokenizer.prompt(p)) for p in prompts) if len(ids) < writing.context_tokens]
    if len(fitting) < len(prompts):
        progress(f"{len(prompts) - len(fitting)} prompts left out: longer than the context")
    if not fitting:
        return
    count = sum(len(text.token_ids) for text in texts)
    remaining = missing(texts, len(fitting), writing)

    async def answer(index: int) -> TargetText:
        prompt = fitting[index % len(fitting)]
        params = SamplingParams(
            max_tokens=min(writing.max_tokens, writing.context_tokens - len(prompt)),
            temperature=writing.temperature,
            seed=writing.seed + index,
        )
        return TargetText(index, prompt, (await engine.sample(SampleRequest(prompt, params))).token_ids)

    running: set[asyncio.Task[TargetText]] = set()
    said = time.monotonic()
    try:
        with path.open("ab") as file:
            while count < writing.tokens:
                while len(running) < writing.in_flight and (index := next(remaining, None)) is not None:
                    running.add(asyncio.create_task(answer(index)))
                if not running:
                    return
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for text in sorted((task.result() for task in ended), key=lambda text: text.index):
                    texts.append(text)
                    count += len(text.token_ids)
                    file.write(to_json(text) + b"\n")
                file.flush()
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    progress(f"{count} of {writing.tokens} tokens written")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
