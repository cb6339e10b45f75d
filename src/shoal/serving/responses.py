"""`POST /v1/responses`, in OpenAI's shapes; nothing is kept, so each request carries its whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from shoal.protocol.sampling import Completion
from shoal.serving.api import Api
from shoal.serving.chat import Asked, ask
from shoal.serving.dialect import Reply
from shoal.serving.events import frame
from shoal.serving.generation import pieces, whole
from shoal.serving.reading import Reader
from shoal.serving.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    ChatBody,
    ChatMessage,
    Content,
    Function,
    FunctionCall,
    JsonFormat,
    NamedFunction,
    NamedSchema,
    NamedTool,
    SchemaFormat,
    TextFormat,
    Tool,
    ToolCall,
    ToolChoice,
    parsed,
)


class Said(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None


class Called(Body):
    """A tool call of the model's."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    arguments: str
    id: str | None = None
    status: str | None = None


class Returned(Body):
    """What a tool returned."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: str
    id: str | None = None
    status: str | None = None


class FlatTool(Function):
    type: Literal["function"]


class FlatChoice(NamedFunction):
    type: Literal["function"]


class FlatSchema(NamedSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: Annotated[TextFormat | JsonFormat | FlatSchema, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class ResponseBody(Body):
    """`POST /v1/responses`."""

    model: str = Field(max_length=1024)
    # The instructions are one message more.
    input: str | Annotated[list[Said | Called | Returned], Field(min_length=1, max_length=MAX_MESSAGES - 1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: list[FlatTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    def as_chat(self) -> ChatBody:
        """The same request as a chat's."""
        messages = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        items = [Said(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if isinstance(item, Said):
                messages.append(ChatMessage(role=item.role, content=item.content))
            elif isinstance(item, Called):
                call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))
            else:
                messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
        choice: ToolChoice | None = None
        if isinstance(self.tool_choice, FlatChoice):
            choice = NamedTool(type="function", function=NamedFunction(name=self.tool_choice.name))
        else:
            choice = self.tool_choice
        asked = self.text.format if self.text else None
        tools = [Tool(type="function", function=Function(**t.model_dump(exclude={"type"}))) for t in self.tools or ()]
        return ChatBody(
            model=self.model,
            messages=messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            user=self.user,
            response_format=SchemaFormat(type="json_schema", json_schema=asked)
            if isinstance(asked, FlatSchema)
            else asked,
        )


async def responses(api: Api, request: Request) -> Response:
    """Answer a conversation."""
    body = parsed(await api.body(request), ResponseBody)
    answer = _Answer(api, body, await ask(api, body.as_chat()))
    if body.stream:
        return api.stream(answer.asked.job, answer.frames())
    return await api.answer(request, answer.asked.job, answer.whole)


class _Answer:
    """One request's answer, whole or as a stream."""

    def __init__(self, api: Api, body: ResponseBody, asked: Asked) -> None:
        self._api, self._body, self.asked = api, body, asked
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._message_id = f"msg_{secrets.token_hex(16)}"
        self._number = -1

    async def whole(self) -> dict[str, Any]:
        ((completion, _),) = await whole(self._api.engine, self.asked.job)
        return self._object(completion, self._output(self.asked.read(completion.text)))

    def _object(self, completion: Completion | None, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        cut = completion is not None and completion.finish == "length"
        prompt, drawn = len(self.asked.job.prompts[0]), len(completion.token_ids) if completion else 0
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": drawn,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + drawn,
        }
        given = self._body.model_dump(mode="json", exclude={"input", "stream", "model", "user", "text"}, by_alias=True)
        return {
            **given,
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._body.model,
            "system_fingerprint": self._api.fingerprint,
            "status": "in_progress" if completion is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "output": list(output),
            "parallel_tool_calls": self._body.parallel_tool_calls is not False,
            "tool_choice": given["tool_choice"] or "auto",
            "tools": given["tools"] or [],
            "usage": usage if completion else None,
        }

    def _output(self, reply: Reply) -> list[dict[str, Any]]:
        found = [self._message(reply.content, "completed")] if reply.content or not reply.calls else []
        return found + [
            {
                "type": "function_call",
                "id": f"fc_{secrets.token_hex(16)}",
                "call_id": f"call_{secrets.token_hex(12)}",
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for call in reply.calls
        ]

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
        return {"type": "message", "id": self._message_id, "role": "assistant", "status": status, "content": content}

    async def frames(self) -> AsyncGenerator[bytes]:
        """The events: the message's text as it comes, calls whole at the end."""
        yield self._event("response.created", response=self._object(None, []))
        reader = Reader(self._api.dialect, self.asked.tools, thinking=self.asked.thinking)
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        text, began = "", False
        async with aclosing(pieces(self._api.engine, self.asked.job)) as found:
            async for piece in found:
                _, more = reader.push(piece.text)
                if piece.completion is not None:
                    more += reader.rest()[0]
                if more and not began:
                    began = True
                    item = self._message(None, "in_progress")
                    yield self._event("response.output_item.added", output_index=0, item=item)
                    part = {"type": "output_text", "text": "", "annotations": []}
                    yield self._event("response.content_part.added", **place, part=part)
                if more:
                    text += more
                    yield self._event("response.output_text.delta", **place, delta=more, logprobs=[])
                if piece.completion is None:
                    continue
                reply = self.asked.read(piece.completion.text)
                output = self._output(Reply(text, calls=reply.calls) if began else reply)
                for index, item in enumerate(output):
                    if item["type"] == "message" and began:
                        part = item["content"][0]
                        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
                        yield self._event("response.content_part.done", **place, part=part)
                    else:
                        yield self._event("response.output_item.added", output_index=index, item=item)
                    yield self._event("response.output_item.done", output_index=index, item=item)
                done = self._object(piece.completion, output)
                yield self._event(f"response.{done['status']}", response=done)

    def _event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        return frame({"type": kind, "sequence_number": self._number, **data}, kind)
