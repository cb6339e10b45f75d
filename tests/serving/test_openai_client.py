"""The official client's calls pass unchanged, against a server in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from serving_cases import MODEL, ChatServer

ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is in the well?"}]}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two digits.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [1, 2, 3]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "name": {"enum": ["left", "right"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def test_models(server: ChatServer) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).owned_by == "shoal"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("another")


def test_chat(server: ChatServer) -> None:
    answer = server.client.chat.completions.create(**ASKED, max_tokens=12, seed=3)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 12
    again = server.client.chat.completions.create(**ASKED, max_completion_tokens=12, seed=3)
    assert again.choices[0].message.content == choice.message.content
    other = server.client.chat.completions.create(**ASKED, max_tokens=12, seed=4)
    assert other.choices[0].message.content != choice.message.content


def test_a_stream_says_what_the_whole_says(server: ChatServer) -> None:
    asked = {**ASKED, "max_tokens": 40, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = server.client.chat.completions.create(**asked)
    assert len({choice.message.content for choice in whole.choices}) == 3
    texts, tokens, finishes = [""] * 3, [[], [], []], [None] * 3
    usage = None
    stream = server.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for streamed, choice in zip(tokens, whole.choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        for one, other in zip(streamed, choice.logprobs.content, strict=True):
            assert abs(one.logprob - other.logprob) < 1e-3
            assert len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.logprob - 1e-6


def test_greedy_tokens_are_the_likeliest(server: ChatServer) -> None:
    answer = server.client.chat.completions.create(**ASKED, max_tokens=10, temperature=0, logprobs=True, top_logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server: ChatServer, stream: bool) -> None:
    free = server.client.chat.completions.create(**ASKED, max_tokens=60, seed=5).choices[0].message.content
    assert free is not None
    stop = free[10:12]
    asked = {**ASKED, "max_tokens": 60, "seed": 5, "stop": [stop]}
    if stream:
        text = "".join(
            choice.delta.content or ""
            for chunk in server.client.chat.completions.create(**asked, stream=True)
            for choice in chunk.choices
        )
    else:
        answer = server.client.chat.completions.create(**asked).choices[0]
        assert answer.finish_reason == "stop"
        text = answer.message.content or ""
    assert text == free[: free.index(stop)]


def test_completions(server: ChatServer) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["one", "two"],
        "max_tokens": 9,
        "seed": 1,
        "logprobs": 2,
        "n": 2,
    }
    whole = server.client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in server.client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == len(logprobs.top_logprobs)
    by_ids = server.client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=3)
    assert by_ids.usage is not None and by_ids.usage.prompt_tokens == 3


def test_a_bias_and_a_penalty_do_what_they_say(server: ChatServer) -> None:
    def drawn(**more: Any) -> list[str]:
        answer = server.client.chat.completions.create(**ASKED, temperature=0, max_tokens=20, logprobs=True, **more)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        return [token.token for token in logprobs.content]

    forced = drawn(logit_bias={"70": 100})
    assert len(set(forced)) == 1 and len(forced) == 20
    # A strong wish against repetition changes what is drawn; the forced token survives neither.
    assert len(set(drawn(logit_bias={"70": 3}, frequency_penalty=2, presence_penalty=2))) > 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept(server: ChatServer, stream: bool) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    asked = {**ASKED, "max_tokens": 80, "n": 4, "seed": 2, "response_format": schema, "temperature": 1.5}
    texts = [""] * 4
    if stream:
        for chunk in server.client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = server.client.chat.completions.create(**asked)
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        point = json.loads(text)
        assert set(point) == {"x", "name"} and -99 <= point["x"] <= 99 and point["name"] in ("left", "right")


def test_a_regular_expression_is_kept(server: ChatServer) -> None:
    answer = server.client.chat.completions.create(
        **ASKED, extra_body={"response_format": {"type": "regex", "regex": "(yes|no)!{2,3}"}}
    )
    assert answer.choices[0].message.content in ("yes!!", "yes!!!", "no!!", "no!!!")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_that_must_be_called_is_called(server: ChatServer, choice: Any) -> None:
    asked = {**ASKED, "tools": [ADD], "tool_choice": choice, "seed": 1, "parallel_tool_calls": False}
    answer = server.client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert 0 <= arguments["a"] <= 9 and arguments["b"] in (1, 2, 3)
    streamed = ""
    for chunk in server.client.chat.completions.create(**asked, stream=True):
        for one in chunk.choices:
            assert not one.delta.content
            for delta in one.delta.tool_calls or ():
                assert delta.function is not None
                streamed += delta.function.arguments or ""
    assert json.loads(streamed) == arguments
    follow: Any = [
        *ASKED["messages"],
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "7"},
    ]
    after = server.client.chat.completions.create(model=MODEL, messages=follow, tools=[ADD], max_tokens=5)
    assert after.usage is not None and after.usage.prompt_tokens > 60


def test_a_tool_that_need_not_be_called(server: ChatServer) -> None:
    answer = server.client.chat.completions.create(**ASKED, tools=[ADD], seed=3, max_tokens=10).choices[0]
    assert answer.finish_reason in ("length", "stop") and answer.message.tool_calls is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 100_000}, None),
        ({"temperature": 3}, "temperature"),
        ({"n": 1000}, "n"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": [""]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
            None,
        ),
        ({"extra_body": {"response_format": {"type": "regex", "regex": "(("}}}, "response_format"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_says_why(
    server: ChatServer, change: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(**{**ASKED, **change})
    assert caught.value.body["message"]  # type: ignore[index]
    assert param is None or caught.value.param == param
    server.until_idle()


async def test_the_async_client_streams(server: ChatServer) -> None:
    stream = await server.async_client.chat.completions.create(**ASKED, max_tokens=10, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_responses(server: ChatServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Say something.", "temperature": 0, "max_output_tokens": 12}
    whole = server.client.responses.create(**asked, instructions="Be brief.")
    assert whole.status in ("completed", "incomplete") and whole.output_text
    assert whole.usage is not None and whole.usage.output_tokens <= 12
    with server.client.responses.stream(**asked, instructions="Be brief.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response() if whole.status == "completed" else None
    assert text == whole.output_text
    assert final is None or final.output_text == text


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_tools(server: ChatServer, stream: bool) -> None:
    tool: Any = {"type": "function", **ADD["function"], "strict": True}
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": [{"role": "user", "content": "2 + 3?"}],
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    if stream:
        events = list(server.client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.completed"
        answer = events[-1].response
    else:
        answer = server.client.responses.create(**asked)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "add"
    assert set(json.loads(call.arguments)) == {"a", "b"}
    follow = [*asked["input"], call.model_dump(exclude_none=True)]
    follow.append({"type": "function_call_output", "call_id": call.call_id, "output": "5"})
    after = server.client.responses.create(model=MODEL, input=follow, tools=[tool], max_output_tokens=4)
    assert after.output[0].type == "message"
