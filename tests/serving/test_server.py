"""A server's life: who is let in, who is turned away, who has gone, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from runs import Process
from serving_cases import HTTP, MODEL, PATIENCE_S, ChatServer, start

from shoal.serving import keys

LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me everything."}],
    "max_tokens": 1500,
    "logit_bias": {"2": -100},  # the end token
    "stream": True,
}
CHAT = "/chat/completions"


def first_line(lines: Iterator[str]) -> str:
    """The first line of a stream that goes on: dropping its iterator would end it."""
    return next(line for line in lines if line)


def test_a_client_that_leaves_a_stream_frees_its_place(server: ChatServer) -> None:
    with HTTP.stream("POST", f"{server.url}{CHAT}", json={**LONG, "n": 4}) as response:
        lines = response.iter_lines()
        assert first_line(lines).startswith("data: ")
        assert server.metric("shoal_completions_inside") == 4
    server.until_idle()


def test_a_client_that_leaves_before_its_answer_frees_its_place(server: ChatServer) -> None:
    before = server.metric("shoal_tokens_drawn_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{CHAT}", json={**LONG, "stream": False, "n": 8}, timeout=0.5)
    server.until_idle()
    assert server.metric("shoal_tokens_drawn_total") - before < 8 * 1500


def test_overload_is_turned_away_and_told_when_to_come_again(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(model)
    table = '[envs.add]\ntype = "arithmetic"\n[serving]\nmax_sequences = 2\nmax_waiting = 1\n'
    (run / "config.toml").write_text(table)
    with start(run, tmp_path) as server:
        with HTTP.stream("POST", f"{server.url}{CHAT}", json={**LONG, "n": 3}) as response:
            lines = response.iter_lines()
            assert first_line(lines).startswith("data: ")
            refused = server.post(CHAT, {**LONG, "stream": False})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                server.client.chat.completions.create(**LONG)
        never = server.post(CHAT, {**LONG, "n": 4})
        assert never.status_code == 400 and never.json()["error"]["param"] == "n"
        server.until_idle()
        assert server.post(CHAT, {**LONG, "stream": False, "max_tokens": 3}).status_code == 200
        assert server.metric("shoal_turned_away_total") == 2


def test_only_who_has_a_key_is_let_in(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = keys.add(path, "alice")
    assert key not in path.read_text()
    with start(model, tmp_path, "--keys", str(path), key=key, SHOAL_API_KEYS="sk-from-the-environment") as server:
        assert [m.id for m in server.client.models.list()] == [MODEL]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}):
            for path_ in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = HTTP.get(f"http://127.0.0.1:{server.port}{path_}", headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="sk-no", max_retries=0).models.list()
        assert HTTP.get(f"http://127.0.0.1:{server.port}/health").json() == {"status": "ok"}
        other = {"Authorization": "Bearer sk-from-the-environment"}
        assert HTTP.get(f"{server.url}/models", headers=other).status_code == 200


def test_pages_of_other_sites_are_not_served(server: ChatServer) -> None:
    """What a browser sends for a stranger's page, which a server without keys could not tell from its user."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    form = {"content-type": "text/plain"}
    for headers, status in (({"Origin": "http://evil.test"}, 403), ({"Host": "evil.test"}, 421)):
        refused = HTTP.post(f"{server.url}{CHAT}", content=json.dumps(body), headers={**form, **headers})
        assert refused.status_code == status, refused.text
        assert "key" in refused.json()["error"]["message"]
        assert HTTP.get(f"{server.url}/models", headers=headers).status_code == status
    assert HTTP.get(f"http://127.0.0.1:{server.port}/health", headers={"Host": "10.0.0.7"}).status_code == 200
    assert server.post(CHAT, body).status_code == 200
    server.until_idle()


def test_beyond_loopback_a_key_is_needed(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = Process(["serve", str(model), "--host", "0.0.0.0", "--port", "0", "--json"], home, tmp_path)
    assert process.wait() == 2
    assert "--new-key" in process.result["error"]["remedy"]
    made = Process(["serve", "--new-key", "bob", "--json"], home, tmp_path)
    assert made.wait() == 0
    assert keys.load(Path(made.result["file"])).owner(made.result["key"]) == "bob"


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_so(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = Process(["serve", str(model), "--port", port, "--json"], tmp_path / "home", tmp_path)
        assert process.wait() == 2
    assert port in process.result["error"]["problem"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_server_that_is_told_to_end_finishes_what_runs(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    with start(model, tmp_path) as server:
        texts: list[str] = []

        def listen() -> None:
            body = {**LONG, "max_tokens": 400}
            with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=PATIENCE_S) as response:
                for line in response.iter_lines():
                    texts.append(line)
                    begun.set()

        begun = threading.Event()
        thread = threading.Thread(target=listen)
        thread.start()
        assert begun.wait(PATIENCE_S)
        server.process.send(number)
        thread.join(PATIENCE_S)
        assert server.process.wait() == 0
        assert [t for t in texts if t][-1] == "data: [DONE]"
        last = json.loads([t for t in texts if t][-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=PATIENCE_S)
