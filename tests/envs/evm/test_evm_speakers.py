"""A server with OpenAI's API as the model: what is sent, and what becomes of servers that are busy, gone or odd."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shoal.envs.evm import speakers
from shoal.envs.evm.speakers import ContextFull, EndpointSpeaker, Reply, served_model
from shoal.errors import ConfigError, NetworkError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Grammar

GOOD = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15},
    "extra": {"of": "theirs"},
}
ASKED = [Message(role="system", content="rules"), Message(role="user", content="hi")]


class Server:
    """Answers from a list, the last one again and again, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[tuple[dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                status, content, headers = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(speakers, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(speakers, "LONGEST_WAIT_S", 0.02)
    made = Server()
    yield made
    made.close()


async def reply(server: Server, *answers: tuple[int, Any], key: str = "", grammar: Grammar | None = None) -> Reply:
    server.answers = [(status, content, {}) for status, content in answers]
    async with EndpointSpeaker(server.url, "theirs", key, max_tokens=9, temperature=0.5) as speaker:
        return await speaker.reply(ASKED, seed=2**40 + 3, grammar=grammar)


async def test_what_is_asked_and_what_is_read(server: Server) -> None:
    grammar = Grammar(kind="lark", text='start: "a"')
    found = await reply(server, (200, GOOD), key="secret", grammar=grammar)
    assert (found.text, found.finish, found.prompt_tokens, found.tokens) == ("hello", "length", 11, 4)
    headers, body = server.asked[0]
    assert headers["authorization"] == "Bearer secret"
    assert body == {
        "model": "theirs",
        "messages": [{"role": "system", "content": "rules"}, {"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "response_format": {"type": "lark", "lark": 'start: "a"'},
    }
    await reply(server, (200, {"choices": [{"message": {"content": None}}]}))
    headers, body = server.asked[1]
    assert "authorization" not in headers and "response_format" not in body


async def test_a_busy_server_is_asked_again_and_not_for_ever(server: Server) -> None:
    server.answers = []
    found = await reply(server, (429, "wait"), (503, b"<html>"), (200, GOOD))
    assert found.text == "hello" and len(server.asked) == 3
    server.asked.clear()
    with pytest.raises(NetworkError, match="attempts: 500"):
        await reply(server, (500, "broken"))
    assert len(server.asked) == speakers.ATTEMPTS


async def test_the_limit_goes_by_the_name_that_a_server_wants(server: Server) -> None:
    refusal = {"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}
    assert (await reply(server, (400, refusal), (200, GOOD))).text == "hello"
    assert [("max_tokens" in body, "max_completion_tokens" in body) for _, body in server.asked] == [
        (True, False),
        (False, True),
    ]
    with pytest.raises(ConfigError):
        await reply(server, (400, refusal))


@pytest.mark.parametrize(
    ("status", "content", "error", "word"),
    [
        (401, {"error": "who are you"}, ConfigError, "--api-key-env"),
        (404, {"error": {"message": "no model theirs"}}, ConfigError, "no model theirs"),
        (400, {"error": {"code": "context_length_exceeded"}}, ContextFull, "no room"),
        (200, b"not json", NetworkError, "no chat completion"),
        (200, {"choices": "many"}, NetworkError, "no chat completion"),
        (200, {"choices": []}, NetworkError, "no choice"),
        (200, b" " * (speakers.MAX_ANSWER_BYTES + 1), NetworkError, "more than 8 MiB"),
    ],
)
async def test_odd_answers_are_errors(
    server: Server, status: int, content: Any, error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        await reply(server, (status, content))
    assert len(server.asked) == 1, "asking again would change nothing"


async def test_a_server_that_is_not_there(server: Server) -> None:
    server.answers = [(200, GOOD, {})]
    async with EndpointSpeaker("http://127.0.0.1:9/v1", "x", "", max_tokens=1, temperature=0) as speaker:
        with pytest.raises(NetworkError, match="did not answer"):
            await speaker.reply(ASKED, seed=0)
    for address in ("127.0.0.1/v1", "ftp://host/v1", "http://", "http://me:secret@host/v1"):
        with pytest.raises(ConfigError, match="no address|no password"):
            EndpointSpeaker(address, "x", "", max_tokens=1, temperature=0)


def test_the_one_model_of_a_server(server: Server) -> None:
    server.answers = [(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}, {})]
    assert served_model(server.url, "") == "tiny"
    server.answers = [(200, {"data": [{"id": "a"}, {"id": "b"}]}, {})]
    with pytest.raises(ConfigError, match="serves a, b"):
        served_model(server.url, "")
    server.answers = [(404, b"<html>", {})]
    with pytest.raises(ConfigError, match="404 and no list"):
        served_model(server.url, "")
    with pytest.raises(NetworkError, match="does not answer"):
        served_model("http://127.0.0.1:9/v1", "")
