"""Capture sessions as clients use them: the official client against a server process, and the episodes it writes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from runs import PATIENCE_S
from serving_cases import HTTP, ChatServer, start
from test_openai_client import ADD

from shoal.engine.tokenizer import Tokenizer
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode

FOLDER = "captured"
HELLO: dict[str, Any] = {"role": "user", "content": "What is in the well?"}
OTHER: dict[str, Any] = {"role": "user", "content": "And under the tree?"}


class Captured:
    """A server that records."""

    def __init__(self, server: ChatServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.root = server.url.removesuffix("/v1")

    def open(self, **body: Any) -> tuple[OpenAI, str]:
        """A session: a client of it, and its URL."""
        answer = HTTP.post(f"{self.root}/sessions", json=body, headers=self.server.headers)
        assert answer.status_code == 201, answer.text
        told = answer.json()
        url = f"{self.root}/sessions/{told['id']}"
        assert told["base_url"] == f"{url}/v1"
        client = OpenAI(base_url=told["base_url"], api_key=told["api_key"], max_retries=0, timeout=PATIENCE_S)
        return client, url

    def reward(self, url: str, value: float = 1.0, *, key: str = "", **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.server.key}"}
        return HTTP.post(f"{url}/reward", json={"reward": value, **body}, headers=headers)

    def episodes(self) -> dict[str, Episode]:
        return {episode.id: episode for episode in read_jsonl(self.folder / "episodes.jsonl", Episode)}

    def episode(self, url: str, value: float = 1.0, **body: Any) -> Episode:
        """Reward a session, and read what it became."""
        answer = self.reward(url, value, **body)
        assert answer.status_code == 200, answer.text
        return self.episodes()[url.rpartition("/")[2]]


@pytest.fixture(scope="module")
def captured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captured]:
    folder = tmp_path_factory.mktemp("sessions")
    with start(model, folder, "--capture", str(folder / FOLDER), "--api-key", "sk-owner", key="sk-owner") as server:
        yield Captured(server, folder / FOLDER)


def ask(client: OpenAI, *messages: dict[str, Any], **more: Any) -> Any:
    return client.chat.completions.create(model="any-model", messages=list(messages), **{"max_tokens": 6, **more})  # type: ignore[arg-type]


def said(answer: Any) -> dict[str, Any]:
    return dict(answer.choices[0].message.model_dump(exclude_none=True))


def test_a_conversation_is_one_sequence_of_the_tokens_really_drawn(captured: Captured, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    client, url = captured.open(task="the well", temperature=0.7)
    first = ask(client, HELLO, temperature=0.0, top_p=0.1, logit_bias={"70": 100}, seed=3)
    second = ask(client, HELLO, said(first), OTHER)
    episode = captured.episode(url, 0.5, parts={"style": 0.25}, output="done")
    assert episode.branches == ((0, 1),) and (episode.task.id, episode.output) == ("the well", "done")
    assert (episode.reward, episode.reward_parts, episode.temperature) == (0.5, {"style": 0.25}, 0.7)
    assert [t.completion.text for t in episode.turns] == [a.choices[0].message.content for a in (first, second)]
    assert len(set(episode.turns[0].completion.token_ids)) > 1, "the agent's bias is not applied"
    tokenizer = Tokenizer(model)
    assert episode.turns[0].context_ids == tuple(tokenizer.conversation([HELLO]))
    ids = [i for turn in episode.turns for i in (*turn.context_ids, *turn.completion.token_ids)]
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = (trained(torch.tensor([ids])).logits[0].float() / 0.7).log_softmax(-1)
    at = 0
    for turn in episode.turns:
        at += len(turn.context_ids)
        for token, logprob in zip(turn.completion.token_ids, turn.completion.logprobs, strict=True):
            assert float(logprobs[at - 1, token]) == pytest.approx(logprob, abs=1e-3)
            at += 1


def test_calls_that_fork_run_side_by_side_and_stream(captured: Captured) -> None:
    client, url = captured.open()
    root = said(ask(client, HELLO))

    def branch(number: int) -> str:
        messages = (HELLO, root, {"role": "user", "content": f"number {number}"})
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, *messages, stream=True))
        return str(said(ask(client, *messages))["content"])

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(branch, range(6)))
    ask(client, {"role": "system", "content": "Be brief."}, HELLO, n=2)
    episode = captured.episode(url)
    assert sorted(map(len, episode.branches)) == [1, 1, 2, 2, 2, 2, 2, 2]
    forked = {turn.observation: turn.completion.text for turn in episode.turns if turn.observation.startswith("num")}
    assert forked == {f"number {number}": text for number, text in enumerate(texts)}


def test_tools_and_their_grammar(captured: Captured) -> None:
    client, url = captured.open()
    tools = {"tools": [ADD], "max_tokens": 120}
    called = said(ask(client, HELLO, tool_choice="required", **tools))
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "5"}
    ask(client, HELLO, called, result, **tools)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    ask(client, HELLO, response_format=schema)
    episode = captured.episode(url)
    first, second, third = episode.turns
    assert episode.branches == ((0, 1), (2,)), "a conversation goes on after a call of a tool"
    assert first.grammar is not None and first.grammar.kind == "lark" and "add" in first.grammar.text
    assert second.grammar is not None and second.grammar != first.grammar and second.observation == "5"
    assert third.grammar is not None and third.grammar.kind == "json_schema"
    assert third.completion.text in ('"yes"', '"no"')


def test_text_completions_continue_too(captured: Captured) -> None:
    client, url = captured.open()

    def complete(prompt: Any) -> str:
        return str(client.completions.create(model="x", prompt=prompt, max_tokens=5).choices[0].text)

    text = "Once upon"
    text += complete(text)
    complete(text + " a time")
    complete([5, 6, 7])
    episode = captured.episode(url)
    assert episode.branches == ((0, 1), (2,)) and episode.turns[2].context_ids == (5, 6, 7)


def test_the_end_of_a_session(captured: Captured) -> None:
    client, url = captured.open()
    key = client.api_key
    ask(client, HELLO)
    assert captured.reward(url, key=key).status_code == 401, "an agent does not reward itself"
    assert captured.reward(url, key="sk-wrong").status_code == 401
    assert HTTP.post(f"{url}/reward", json={"reward": "NaN"}, headers=captured.server.headers).status_code == 400
    state = HTTP.get(url, headers={"Authorization": f"Bearer {key}"}).json()
    assert state["calls"] == state["begun"] == 1 and state["open"] and state["tokens"] > 6
    assert captured.reward(url).status_code == 200
    assert captured.reward(url).status_code == 404
    with pytest.raises(openai.NotFoundError):
        ask(client, HELLO)
    nothing = captured.open()[1]
    assert captured.reward(nothing).json()["outcome"] == "void"
    client, url = captured.open(agent_rewards=True)
    ask(client, HELLO)
    assert captured.reward(url, key=client.api_key).json()["outcome"] == "done"
    client, url = captured.open()
    assert HTTP.delete(url, headers=captured.server.headers).status_code == 204
    assert url.rpartition("/")[2] not in captured.episodes()


def test_bounds(captured: Captured) -> None:
    client, url = captured.open(max_calls=2, max_tokens=4)
    assert ask(client, HELLO, max_tokens=500).usage.completion_tokens <= 4
    ask(client, HELLO)
    with pytest.raises(openai.BadRequestError, match="2 calls"):
        ask(client, HELLO)
    captured.reward(url)
    client, late = captured.open(life_s=0.2)
    import time

    time.sleep(0.3)
    with pytest.raises(openai.NotFoundError):
        ask(client, HELLO)
    assert captured.episodes()[late.rpartition("/")[2]].void_reason.startswith("its time was over")
    other = captured.open()[0]
    stranger = OpenAI(base_url=str(other.base_url), api_key="sk-owner-of-nothing", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        ask(stranger, HELLO)
    assert HTTP.post(f"{captured.root}/sessions", json={}).status_code == 401


def test_what_is_redacted_is_not_kept(captured: Captured) -> None:
    client, url = captured.open(redact=["the tree"])
    ask(client, HELLO)
    ask(client, OTHER)
    episode = captured.episode(url, output="I looked under the tree.")
    assert [turn.observation for turn in episode.turns] == [HELLO["content"]]
    assert episode.output == "I looked under [redacted]."
    client, url = captured.open(redact=["well"])
    ask(client, HELLO)
    assert captured.episode(url).outcome == "void"


def test_off_by_default(server: ChatServer) -> None:
    root = server.url.removesuffix("/v1")
    assert HTTP.post(f"{root}/sessions", json={}).status_code == 404
    assert HTTP.post(f"{root}/sessions/x/v1/chat/completions", json={}).status_code == 404
