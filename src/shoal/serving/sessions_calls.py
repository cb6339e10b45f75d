"""Calls in a capture session: answered as everywhere, and recorded.

    body ──▶ the session's own sampling put in ──▶ prompt: recorded ids where it continues a call, else rendered
         ──▶ the usual answer, whole or streamed, from an engine that records each completion as it ends

Invariants: what an agent is answered is what was recorded, and it is recorded before the agent has all of it, so its
next call finds it; an answer that the agent does not wait for is not recorded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.grammar import Grammars
from shoal.engine.sequence import Drawn
from shoal.engine.shaping import Shaping
from shoal.engine.stats import EngineStats
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.rollout.calltree import ROOT, Call, Place
from shoal.rollout.session import SessionFull, SessionOver
from shoal.serving import chat, completions
from shoal.serving.api import Api, asked_grammar, json_response
from shoal.serving.backend import Engine
from shoal.serving.dialect import Reply
from shoal.serving.errors import ApiError
from shoal.serving.generation import Job
from shoal.serving.schema import ChatBody, ChatMessage, CompletionBody, Sampling, Tool, parsed
from shoal.serving.sessions import Entry, House, message_text

NEUTRAL: dict[str, Any] = {
    "top_p": None,
    "top_k": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "logit_bias": None,
}
"""What would make log-probabilities those of another distribution than the policy's."""

ToCall = Callable[[SampleRequest, Completion], Call]


class Recorded:
    """An engine whose completions one session keeps.

    Args:
        to_call: makes a completion into the call that is recorded.
    """

    def __init__(self, engine: Engine, entry: Entry, to_call: ToCall) -> None:
        self._engine, self._entry, self._to_call = engine, entry, to_call

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def grammars(self) -> Grammars:
        return self._engine.grammars

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def context_tokens(self) -> int:
        return self._engine.context_tokens

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    @property
    def trouble(self) -> str:
        return self._engine.trouble

    @property
    def lossy_rule(self) -> str:
        return self._engine.lossy_rule

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check(self, request: SampleRequest) -> None:
        self._engine.check(request)

    async def close(self) -> None:
        await self._engine.close()

    async def draws(self, request: SampleRequest, shaping: Shaping) -> AsyncGenerator[Drawn | Completion]:
        """As the engine's own."""
        session = self._entry.session
        request = msgspec.structs.replace(request, min_version=session.rules.min_version)
        async with aclosing(self._entry.draws(request, shaping)) as found:
            async for drawn in found:
                if isinstance(drawn, Completion):
                    session.record(self._to_call(request, drawn))
                yield drawn


async def session_chat(api: Api, house: House, request: Request) -> Response:
    """`POST /sessions/ID/v1/chat/completions`."""
    entry = house.entry(request)
    body = _own(parsed(await api.body(request), ChatBody), api.model, entry)
    limit = body.max_completion_tokens or body.max_tokens
    asked = await chat.ask(api, body)
    conversation = [_message(message) for message in body.messages]
    setting = message_text(["chat", [tool.model_dump() for tool in asked.tools]])
    place = entry.session.tree.place(conversation, setting)
    prompt = asked.job.prompts[0]
    if place.parent != ROOT:
        try:
            said = _following(api, body.messages[place.known :], asked.tools, place)
            prompt = (*place.ids, *said, *asked.closing)
        except ModelError:
            place = Place()  # the template has no such turn of a conversation, so it is one of its own
    job = _begun(api, entry, replace(asked.job, prompts=[prompt]), limit, [place])
    asked = replace(asked, job=job)
    grammar = asked_grammar(chat.grammar(api, body, asked.tools), body.response_format)

    def to_call(given: SampleRequest, completion: Completion) -> Call:
        reply = asked.read(completion.text)
        return Call(
            place.parent,
            given.prompt_ids[len(place.ids) :],
            completion,
            grammar,
            body.messages[-1].text,
            (*conversation, _reply(reply)),
            setting,
        )

    return await chat.answered(_recording(api, entry, to_call), request, body, asked)


async def session_completions(api: Api, house: House, request: Request) -> Response:
    """`POST /sessions/ID/v1/completions`."""
    entry = house.entry(request)
    body = _own(parsed(await api.body(request), CompletionBody), api.model, entry)
    job = await completions.ask(api, body)
    tree, setting = entry.session.tree, message_text(["text"])
    texts = _texts(body)
    places: dict[tuple[int, ...], tuple[Place, str]] = {}
    prompts: list[tuple[int, ...]] = []
    for number, whole in enumerate(job.prompts):
        ids, text = whole, texts[number]
        place = tree.place_ids(whole, setting) if text is None else tree.place_text(text, setting)
        if text is not None and place.parent != ROOT:
            ids = (*place.ids, *api.engine.tokenizer.encode(text[place.known :]))
        prompts.append(ids)
        places[ids] = (place, "" if text is None else text)
    job = _begun(api, entry, replace(job, prompts=prompts), body.max_tokens, [place for place, _ in places.values()])
    grammar = asked_grammar(None, body.response_format)

    def to_call(given: SampleRequest, completion: Completion) -> Call:
        place, text = places[given.prompt_ids]
        shown = text or api.engine.tokenizer.decode(given.prompt_ids)
        return Call(
            place.parent,
            given.prompt_ids[len(place.ids) :],
            completion,
            grammar,
            shown,
            (shown, completion.text),
            setting,
        )

    return await completions.answered(_recording(api, entry, to_call), request, body, job)


async def session_models(api: Api, house: House, request: Request) -> Response:
    """`GET /sessions/ID/v1/models`."""
    house.entry(request)
    model = {"id": api.model, "object": "model", "created": api.created, "owned_by": "shoal"}
    return json_response({"object": "list", "data": [model]})


def _own(body: Any, model: str, entry: Entry) -> Any:
    """The body with what the session decides: the model, whatever the agent calls it, and how it samples."""
    assert isinstance(body, Sampling)
    return body.model_copy(
        update={**NEUTRAL, "model": model, "temperature": entry.session.rules.params.temperature, "seed": None}
    )


def _begun(api: Api, entry: Entry, job: Job, limit: int | None, places: Sequence[Place]) -> Job:
    """The job as the session lets it be drawn; its completions are counted from now on."""
    rules = entry.session.rules.params
    longest = max(map(len, job.prompts))
    room = max(1, api.engine.context_tokens - longest)
    most = min(limit or rules.max_tokens, rules.max_tokens, room)
    known = sum(len(place.ids) for place in places)
    tokens = job.choices * (sum(map(len, job.prompts)) - known + most * len(job.prompts))
    try:
        params: SamplingParams = entry.session.begin(job.size, tokens)
    except SessionOver:
        raise ApiError(410, "This session is over.", code="session_over") from None
    except SessionFull as error:
        raise ApiError(400, str(error), code="session_full") from None
    stop = job.params.stop or params.stop
    return replace(job, params=msgspec.structs.replace(params, max_tokens=most, stop=stop))


def _recording(api: Api, entry: Entry, to_call: ToCall) -> Api:
    """The same server, gate and counters included, over an engine that records."""
    recording = copy.copy(api)
    recording.engine = Recorded(api.engine, entry, to_call)
    return recording


def _following(api: Api, messages: Sequence[ChatMessage], tools: Sequence[Tool], place: Place) -> list[int]:
    """Token ids of what was said since the call that is continued; raises `ModelError` as the tokenizer does."""
    native = [tool.model_dump(exclude_none=True) for tool in tools] if api.dialect.native_tools else []
    return api.engine.tokenizer.following(place.ids, api.dialect.messages(messages, ()), native)


def _texts(body: CompletionBody) -> list[str | None]:
    """Each prompt's text; None where it is given as token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [None]
    return [text if isinstance(text, str) else None for text in given]


def _message(message: ChatMessage) -> str:
    """A message as it is told apart from others: what the model reads of it."""
    calls = [[call.function.name, _canonical(call.function.arguments)] for call in message.tool_calls or ()]
    role = "system" if message.role == "developer" else message.role
    return message_text([role, message.text, calls, message.name if role != "assistant" else None])


def _reply(reply: Reply) -> str:
    """What the agent will send back of an answer, as `_message` tells it."""
    calls = [[call.name, _canonical(call.arguments)] for call in reply.calls]
    return message_text(["assistant", reply.content, calls, None])


def _canonical(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
