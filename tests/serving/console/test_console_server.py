"""The console beside `shoal serve`, and a server as the console sees it: the real one, on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from console_cases import Page
from safetensors import safe_open
from serving_cases import HTTP, MODEL, ChatServer, start

from shoal.broadcast.tensors import view_of
from shoal.cli._version import write_safetensors
from shoal.errors import ConfigError, ModelError, NetworkError
from shoal.protocol.chat import Message
from shoal.serving.console.answers import Ask, Endpoint, answered
from shoal.serving.console.asked import Server
from shoal.serving.console.voices import Voices, versions

HELLO = [Message(role="user", content="hello")]


async def whole(pieces: AsyncIterator[dict[str, object]]) -> tuple[str, dict[str, object]]:
    text, done = "", {}
    async for piece in pieces:
        text += str(piece.get("text", ""))
        if isinstance(piece.get("done"), dict):
            done = dict(piece["done"])
    return text, done


async def test_a_server_is_watched_and_talked_to(server: ChatServer) -> None:
    watched = Server(f"http://127.0.0.1:{server.port}")
    assert await watched.look()
    assert watched.models == (MODEL,)
    assert watched.problem == ""
    before = watched.counters["shoal_tokens_drawn_total"]
    voices = Voices({}, watched)
    assert voices.choices() == [f"served/{MODEL}"]
    ask = Ask(voice=f"served/{MODEL}", messages=HELLO, max_tokens=12, temperature=1.0, seed=3)
    text, done = await whole(voices.say(ask))
    assert done["tokens"] == 12
    assert float(str(done["seconds"])) > 0
    assert (text, done["tokens"]) == ((await whole(voices.say(ask)))[0], 12), "the seed says it all"
    await watched.look()
    assert watched.counters["shoal_tokens_drawn_total"] >= before + 24
    assert watched.curves["tokens_per_s"].points


async def test_what_a_server_refuses_is_said(server: ChatServer, unused_port: int) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "nobody")
    with pytest.raises(NetworkError, match="not served here"):
        await whole(answered(endpoint, Ask(voice="", messages=HELLO)))
    gone = Server(f"http://127.0.0.1:{unused_port}")
    assert await gone.look()
    assert "does not answer" in gone.problem
    other = Server(f"http://127.0.0.1:{server.port}/v1/models?")
    await other.look()
    assert other.problem


async def test_what_cannot_be_asked_is_said() -> None:
    voices = Voices({}, None)
    for ask, error in (
        (Ask(voice="a@1", messages=HELLO), ModelError),
        (Ask(voice="a@1", messages=[]), ConfigError),
        (Ask(voice="a@1", messages=HELLO, max_tokens=10**6), ConfigError),
        (Ask(voice="a@1", messages=HELLO, temperature=-1.0), ConfigError),
        (Ask(voice="a@1", messages=HELLO, draft="/etc/passwd"), ConfigError),
    ):
        with pytest.raises(error):
            await whole(voices.say(ask))


def test_the_pages_are_beside_the_api(server: ChatServer) -> None:
    root = f"http://127.0.0.1:{server.port}"
    page = HTTP.get(f"{root}/console/overview")
    assert page.status_code == 200
    assert "Server" in Page(page.text).words
    assert not Page(page.text).wrong
    assert HTTP.get(f"{root}/console/overview", headers={"Host": "evil.test"}).status_code == 421
    assert f"served/{MODEL}" in HTTP.get(f"{root}/console/playground").text or "nobody to talk to" in page.text


@pytest.mark.slow
def test_keys_of_the_api_open_the_pages(model: Path, tmp_path: Path) -> None:
    with start(model, tmp_path, key="k1", SHOAL_API_KEYS="k1") as keyed:
        root = f"http://127.0.0.1:{keyed.port}"
        with httpx.Client(base_url=root, timeout=60.0) as client:
            assert client.get("/console/overview").status_code == 303
            assert client.get("/v1/models").status_code == 401
            assert client.post("/console/login", data={"key": "wrong"}).status_code == 401
            assert client.post("/console/login", data={"key": "k1"}).status_code == 303
            assert client.get("/console/overview").status_code == 200
            assert client.get("/v1/models").status_code == 401, "the cookie opens pages alone"


def test_a_version_is_written_as_a_checkpoint_is(tmp_path: Path) -> None:
    content = {
        "a.weight": view_of("F32", (2, 3), np.arange(6, dtype="<f4").tobytes()),
        "b": view_of("BF16", (2,), b"\x80\x3f\x00\x40"),
        "empty": view_of("I64", (0,), b""),
    }
    write_safetensors(tmp_path / "model.safetensors", content)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a.weight", "b", "empty"]
        assert file.get_tensor("a.weight").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        assert file.get_tensor("b").tolist() == [1.0, 2.0]
        assert file.get_tensor("empty").shape == (0,)


def test_the_versions_of_a_run(tmp_path: Path) -> None:
    assert versions(tmp_path) == []
    folder = tmp_path / "snapshots" / "manifests" / "policy"
    folder.mkdir(parents=True)
    for name in ("000000000012", "000000000003", "notes", "9" * 40):
        (folder / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert versions(tmp_path) == ["final", "newest", "12", "3"]


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])
