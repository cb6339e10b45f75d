"""`POST /v1/completions`, in OpenAI's shapes."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.sequence import Drawn
from shoal.protocol.sampling import Completion
from shoal.serving.api import Api
from shoal.serving.chat import usage
from shoal.serving.errors import bad_request
from shoal.serving.events import DONE, frame
from shoal.serving.generation import Job, pieces, whole
from shoal.serving.schema import MAX_CHOICES, CompletionBody, parsed

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint."""


async def completions(api: Api, request: Request) -> Response:
    """Complete one text or several."""
    body = parsed(await api.body(request), CompletionBody)
    return await answered(api, request, body, await ask(api, body))


async def ask(api: Api, body: CompletionBody) -> Job:
    """Make prompts into what the engine is asked for."""
    adapter = api.adapter_of(body.model)
    prompts = token_ids(api, body)
    if len(prompts) * body.choices > MAX_CHOICES:
        raise bad_request(f"{len(prompts)} prompts with n = {body.choices} exceed {MAX_CHOICES} completions.", "n")
    return Job(
        prompts=prompts,
        params=api.params(body, body.max_tokens or DEFAULT_MAX_TOKENS, max(map(len, prompts))),
        choices=body.choices,
        shaping=await api.shaping(body, body.logprobs or 0, None, body.response_format, adapter=adapter),
    )


async def answered(api: Api, request: Request, body: CompletionBody, job: Job) -> Response:
    """The answer to what was asked, whole or as a stream."""
    answer = _Answer(api, body, job)
    if body.stream:
        return api.stream(job, answer.frames())
    return await api.answer(request, job, answer.whole)


def token_ids(api: Api, body: CompletionBody) -> list[tuple[int, ...]]:
    """The prompts as token ids; a prompt may be given as ids."""
    given = body.prompt
    if isinstance(given, str):
        texts: list[Any] = [given]
    else:
        texts = [given] if given and isinstance(given[0], int) else list(given)
    if not texts or len(texts) > MAX_CHOICES:
        raise bad_request(f"There must be between 1 and {MAX_CHOICES} prompts.", "prompt")
    tokenizer = api.engine.tokenizer
    start = [i for i in tokenizer.hf.encode("") if i == tokenizer.hf.bos_token_id]
    found = [tuple([*start, *tokenizer.encode(p)] if isinstance(p, str) else p) for p in texts]
    if not all(found):
        raise bad_request("A prompt is empty.", "prompt")
    return found


class _Answer:
    """One request's answer, whole or as a stream."""

    def __init__(self, api: Api, body: CompletionBody, job: Job) -> None:
        self._api, self._body, self._job = api, body, job
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": api.fingerprint,
        }
        self._offsets = [0] * job.size

    async def whole(self) -> dict[str, Any]:
        results = await whole(self._api.engine, self._job)
        choices = [
            self._choice(index, completion.text, drawn, completion.finish, completion.token_ids)
            for index, (completion, drawn) in enumerate(results)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._job, [c for c, _ in results])}

    async def frames(self) -> AsyncGenerator[bytes]:
        """The chunks, and the usage if it was asked for."""
        done: list[Completion] = []
        more = {"usage": None} if self._body.wants_usage else {}
        async with aclosing(pieces(self._api.engine, self._job)) as found:
            async for piece in found:
                finish = piece.completion.finish if piece.completion else None
                choice = self._choice(piece.choice, piece.text, piece.drawn, finish, piece.ids)
                yield frame({**self._head, "choices": [choice], **more})
                if piece.completion is not None:
                    done.append(piece.completion)
        if self._body.wants_usage:
            yield frame({**self._head, "choices": [], "usage": usage(self._job, done)})
        yield frame(DONE)

    def _choice(
        self, index: int, text: str, drawn: Sequence[Drawn], finish: str | None, ids: tuple[int, ...]
    ) -> dict[str, Any]:
        logprobs = None if self._body.logprobs is None else self._logprobs(index, drawn)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if not self._body.return_token_ids:
            return choice
        return {**choice, "token_ids": ids, "prompt_token_ids": self._job.prompts[index // self._job.choices]}

    def _logprobs(self, index: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        decode = self._api.engine.tokenizer.hf.decode
        tokens = [str(decode([one.token])) for one in drawn]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in drawn],
            "top_logprobs": [{str(decode([t])): logprob for t, logprob in one.top} for one in drawn],
            "text_offset": offsets,
        }
