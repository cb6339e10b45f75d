"""`POST /v1/chat/completions`, in OpenAI's shapes."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.sequence import Drawn
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError
from shoal.protocol.sampling import Completion
from shoal.serving.api import Api, asked_grammar
from shoal.serving.dialect import THINK, THOUGHT, Call, Dialect, Reply
from shoal.serving.errors import bad_request
from shoal.serving.events import DONE, frame
from shoal.serving.generation import Job, pieces, whole
from shoal.serving.reading import Reader
from shoal.serving.schema import ChatBody, NamedTool, Tool, parsed

TAIL_IDS = 8
"""Tokens at a prompt's end that are looked at for the beginning of a thought."""


@dataclass(frozen=True)
class Asked:
    """What a conversation asks for."""

    job: Job
    dialect: Dialect
    tools: Sequence[Tool]
    """Those that may be called."""
    thinking: bool
    """The prompt ends inside of a thought."""
    closing: tuple[int, ...] = ()
    """The prompt's last ids, which end the thought that the template began (`_closing`)."""

    def read(self, text: str) -> Reply:
        """A completion's text, taken apart."""
        return self.dialect.read(THINK + text if self.thinking else text, self.tools)


async def chat(api: Api, request: Request) -> Response:
    """Answer a conversation."""
    body = parsed(await api.body(request), ChatBody)
    return await answered(api, request, body, await ask(api, body))


async def answered(api: Api, request: Request, body: ChatBody, asked: Asked) -> Response:
    """The answer to what was asked, whole or as a stream."""
    answer = _Answer(api, body, asked)
    if body.stream:
        return api.stream(answer.asked.job, answer.frames())
    return await api.answer(request, answer.asked.job, answer.whole)


async def ask(api: Api, body: ChatBody) -> Asked:
    """Make a conversation into what the engine is asked for."""
    adapter = api.adapter_of(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs = true.", "top_logprobs")
    tools = offered(body)
    try:
        said = api.notes.put(body.messages, body.user) if api.notes is not None else body.messages
        messages = api.dialect.messages(said, tools)
        native = [tool.model_dump(exclude_none=True) for tool in tools] if api.dialect.native_tools else []
        prompt = tuple(api.engine.tokenizer.conversation(messages, native))
    except ModelError as error:
        raise bad_request(str(error), "messages") from None
    tail = api.engine.tokenizer.hf.decode(prompt[-TAIL_IDS:]).rstrip() if api.dialect.thinks else ""
    thinking = tail.endswith(THINK)
    closing = _closing(api, body, tools) if thinking else ()
    prompt += closing
    job = Job(
        prompts=[prompt],
        params=api.params(body, body.max_completion_tokens or body.max_tokens, len(prompt)),
        choices=body.choices,
        shaping=await api.shaping(
            body, body.top_logprobs or 0, grammar(api, body, tools), body.response_format, adapter=adapter
        ),
    )
    return Asked(job, api.dialect, tools, thinking and not closing, closing)


def _closing(api: Api, body: ChatBody, tools: Sequence[Tool]) -> tuple[int, ...]:
    """Where the answer must match a grammar from its first token on: what ends an open thought.

    Otherwise the answer would be written, and read, as the thought.
    """
    must_call = bool(tools) and body.tool_choice not in (None, "auto")
    if not must_call and asked_grammar(None, body.response_format) is None:
        return ()
    return tuple(api.engine.tokenizer.hf.encode(f"\n{THOUGHT}\n\n", add_special_tokens=False))


def offered(body: ChatBody) -> list[Tool]:
    """The tools that may be called."""
    tools = body.tools or []
    if len({tool.function.name for tool in tools}) != len(tools):
        raise bad_request("Two tools have one name.", "tools")
    if body.tool_choice == "none":
        return []
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
    if body.tool_choice not in (None, "auto") and not tools:
        raise bad_request("There is no tool to choose.", "tool_choice")
    return tools


def grammar(api: Api, body: ChatBody, tools: Sequence[Tool]) -> str | None:
    """What a completion must match because of the tools."""
    if not tools:
        return None
    if body.response_format is not None and body.response_format.type != "text":
        raise bad_request("response_format and tools cannot both constrain one answer.", "response_format")
    must_call = body.tool_choice not in (None, "auto")
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    return api.dialect.grammar(tools, must_call=must_call, parallel=parallel)


class _Answer:
    """One request's answer, whole or as a stream."""

    def __init__(self, api: Api, body: ChatBody, asked: Asked) -> None:
        self._api, self._body, self.asked, self._job = api, body, asked, asked.job
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": api.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        results = await whole(self._api.engine, self._job)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, *result) for index, result in enumerate(results)],
            "usage": usage(self._job, [completion for completion, _ in results]),
            **self._prompt_ids(),
        }

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._job.prompts[0]} if self._body.return_token_ids else {}

    def _choice(self, index: int, completion: Completion, drawn: Sequence[Drawn]) -> dict[str, Any]:
        reply = self.asked.read(completion.text)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
        if not reply.calls:
            message["content"] = reply.content
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [_call(call) for call in reply.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(drawn),
            "finish_reason": "tool_calls" if reply.calls else completion.finish,
            **({"token_ids": completion.token_ids} if self._body.return_token_ids else {}),
        }

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [token_logprob(self._api.engine.tokenizer, one) for one in drawn], "refusal": None}

    async def frames(self) -> AsyncGenerator[bytes]:
        """The chunks: first each choice's role, then deltas, its finish, and the usage if it was asked for."""
        asked = self.asked
        readers = [Reader(asked.dialect, asked.tools, thinking=asked.thinking) for _ in range(self._job.size)]
        for index in range(self._job.size):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        done: list[Completion] = []
        async with aclosing(pieces(self._api.engine, self._job)) as found:
            async for piece in found:
                reader = readers[piece.choice]
                reasoning, content = reader.push(piece.text)
                if reasoning:
                    yield self._chunk(piece.choice, {"reasoning_content": reasoning})
                calls: tuple[Call, ...] = ()
                if piece.completion is not None:
                    done.append(piece.completion)
                    rest, calls = reader.rest()
                    content += rest
                asked_ids = piece.ids if self._body.return_token_ids else ()
                if content or asked_ids or (piece.drawn and self._body.logprobs):
                    yield self._chunk(piece.choice, {"content": content}, self._logprobs(piece.drawn), ids=asked_ids)
                for number, call in enumerate(calls):
                    yield self._chunk(piece.choice, {"tool_calls": [{"index": number, **_call(call)}]})
                if piece.completion is not None:
                    finish = "tool_calls" if calls else piece.completion.finish
                    yield self._chunk(piece.choice, {}, finish=finish)
        if self._body.wants_usage:
            yield frame(
                {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._job, done)}
            )
        yield frame(DONE)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        ids: tuple[int, ...] = (),
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        more: dict[str, Any] = {"usage": None} if self._body.wants_usage else {}
        if self._body.return_token_ids:
            choice["token_ids"] = ids
            more |= self._prompt_ids() if "role" in delta else {}
        return frame({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def token_logprob(tokenizer: Tokenizer, drawn: Drawn) -> dict[str, Any]:
    """One token's entry. A token that is part of a character has no text of its own, and no bytes here."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = str(tokenizer.hf.decode([token]))
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    return {**entry(drawn.token, drawn.logprob), "top_logprobs": [entry(*one) for one in drawn.top]}


def usage(job: Job, done: Sequence[Completion]) -> dict[str, int]:
    prompt = sum(len(p) for p in job.prompts)
    drawn = sum(len(completion.token_ids) for completion in done)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
