"""`shoal serve --stages`: real processes that share a model's layers, killed and replaced."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_cases import PLAIN, make_checkpoint
from runs import PATIENCE_S, Process, child, children_of
from serving_cases import HTTP, MODEL, ChatServer, start

LONG: dict[str, Any] = {"model": MODEL, "prompt": "hello there", "max_tokens": 300, "temperature": 0, "seed": 1}
LONG |= {"logit_bias": {"2": -100}}  # the end token
SHORT = {**LONG, "max_tokens": 8}
PATH = "/completions"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers."""
    return make_checkpoint(
        tmp_path_factory.mktemp("deep") / "model", PLAIN, num_hidden_layers=4, max_position_embeddings=2048
    )


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def ticket(server: ChatServer) -> str:
    return str(server.process.result["ticket"])


def status(server: ChatServer, folder: Path) -> list[dict[str, Any]]:
    """The stages that `shoal status` shows."""
    asking = Process(["status", ticket(server), "--json"], folder / "looker", folder)
    assert asking.wait() == 0, asking.said
    return [node for node in asking.result["nodes"] if node["role"] == "stage"]


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    return str(choice["text"])


def stream(server: ChatServer, into: list[str]) -> None:
    """The same text, piece by piece."""
    with HTTP.stream("POST", f"{server.url}{PATH}", json={**LONG, "stream": True}) as response:
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                said = json.loads(line.removeprefix("data: "))
                into.append(said["choices"][0]["text"] if "choices" in said else str(said))


def test_a_killed_stage_is_a_pause_and_not_an_error(deep: Path, tmp_path: Path) -> None:
    with start(deep, tmp_path, "--stages", "2") as server:
        whole = text_of(server.post(PATH, LONG))
        said: list[str] = []
        reader = threading.Thread(target=stream, args=(server, said))
        reader.start()
        until(lambda: len(said) > 20, "nothing is streamed")
        victim = child(server.process.pid, "stage-1")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        reader.join(PATIENCE_S)
        assert not reader.is_alive() and "".join(said) == whole
        assert server.metric("shoal_tokens_rebuilt_total") > 0
        stages = children_of(server.process.pid)
        server.process.send(signal.SIGTERM)
        assert server.process.wait() == 0, server.process.said
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stages), "stages outlive their server")
        assert not list((tmp_path / "home" / "serving").glob("serve-*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_that_comes_back_gets_layers_again(deep: Path, tmp_path: Path) -> None:
    """Also: status names stages and layers, and the text is the one that one process draws."""
    with start(deep, tmp_path) as one:
        whole = text_of(one.post(PATH, LONG))
    with start(deep, tmp_path, "--stages", "2") as server:
        assert text_of(server.post(PATH, LONG)) == whole
        victim = child(server.process.pid, "stage-0")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert text_of(server.post(PATH, LONG)) == whole

        def active() -> list[str]:
            return sorted(stage["why"] for stage in status(server, tmp_path) if stage["state"] == "active")

        until(lambda: len(active()) == 2, "no stage came back")
        layers = active()
        assert layers[0].startswith("layers 0 to ") and layers[1].endswith(" to 3")
        assert text_of(server.post(PATH, LONG)) == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_stage_is_taken_for_lost_and_comes_back(deep: Path, tmp_path: Path) -> None:
    with start(deep, tmp_path, "--stages", "2") as server:
        whole = text_of(server.post(PATH, LONG))
        victim = child(server.process.pid, "stage-0")
        assert victim is not None
        os.kill(victim, signal.SIGSTOP)
        assert text_of(server.post(PATH, LONG)) == whole
        (left,) = [stage for stage in status(server, tmp_path) if stage["state"] == "active"]
        assert left["name"] == "stage-1" and left["why"] == "layers 0 to 3"
        os.kill(victim, signal.SIGCONT)
        until(lambda: [s["state"] for s in status(server, tmp_path)] == ["active"] * 2, "it does not come back")
        assert text_of(server.post(PATH, LONG)) == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_stage_outlives_a_server_that_was_killed(deep: Path, tmp_path: Path) -> None:
    with start(deep, tmp_path, "--stages", "2") as server:
        text_of(server.post(PATH, SHORT))
        stages = children_of(server.process.pid)
        assert len(stages) == 2
        server.process.send(signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stages), "stages outlive their server")
        (left,) = (tmp_path / "home" / "serving").glob("serve-*")
    with start(deep, tmp_path, "--stages", "1"):
        assert not left.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_from_elsewhere_and_none_at_all(deep: Path, tmp_path: Path) -> None:
    """They fetch their layers from the server; with none left, 503 and the reason; one that comes is used."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(deep)
    (run / "config.toml").write_text(
        '[envs.add]\ntype = "arithmetic"\n[serving]\nstages = 2\nlocal_stages = 0\nstage_patience_s = 2.0\n'
    )
    started: list[Process] = []

    def join(name: str) -> Process:
        started.append(Process(["worker", ticket(server), "--stage", "--name", name], tmp_path / name, tmp_path))
        return started[-1]

    try:
        with start(run, tmp_path) as server:
            until(lambda: server.post(PATH, SHORT).status_code == 503, "requests are answered by nobody")
            first, second = join("first"), join("second")
            until(lambda: server.post(PATH, SHORT).status_code == 200, "the stages do not work")
            assert {stage["name"] for stage in status(server, tmp_path)} == {"first", "second"}
            before = text_of(server.post(PATH, LONG))
            said: list[str] = []
            reader = threading.Thread(target=stream, args=(server, said))
            reader.start()
            until(lambda: len(said) > 20, "nothing is streamed")
            first.end()
            second.end()
            reader.join(PATIENCE_S)
            assert not reader.is_alive() and "error" in said[-1], said[-1]
            refused = server.post(PATH, SHORT)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert "0 stages hold 0 of the model's 4 layers" in refused.json()["error"]["message"]
            assert HTTP.get(f"http://127.0.0.1:{server.port}/health").status_code == 503
            server.until_idle()
            third = join("third")
            until(lambda: server.post(PATH, SHORT).status_code == 200, "the new stage does not work")
            assert text_of(server.post(PATH, LONG)) == before
            server.process.send(signal.SIGTERM)
            assert server.process.wait() == 0
            assert third.wait() != 0, third.said
    finally:
        for process in started:
            process.end()
