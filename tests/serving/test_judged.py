"""A judge behind a real server: its marks, its cache, and that whatever it gets wrong is void and not reward 0."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from serving_cases import MODEL, ChatServer

from shoal.envs.registry import make
from shoal.errors import ConfigError, NetworkError, RecordError
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Completion


def environment(url: str, **settings: Any) -> Any:
    return make("judged", {"tasks": "arithmetic", "base_url": url, "model": MODEL, **settings}, name="marked")


async def mark(env: Any, reply: str) -> float:
    await env.reset(env.task("train", 0, 0))
    return float((await env.step(reply)).reward)


@pytest.mark.parametrize(("scale", "allowed"), [("yes_no", {0.0, 1.0}), ("0-10", {n / 10 for n in range(11)})])
async def test_a_served_model_judges_within_the_scale(server: ChatServer, scale: str, allowed: set[float]) -> None:
    """A random model: only the grammar makes marks of what it says."""
    env = environment(server.url, scale=scale)
    before = server.metric("shoal_tokens_drawn_total")
    marks = [await mark(env, f"The answer is {number}.") for number in range(6)]
    assert set(marks) <= allowed
    drawn = server.metric("shoal_tokens_drawn_total")
    assert drawn > before
    assert [await mark(env, f"The answer is {number}.") for number in range(6)] == marks
    assert server.metric("shoal_tokens_drawn_total") == drawn, "the same question is not asked twice"


def episode(env: Any, reward: float, finish: Any = "stop") -> Episode:
    completion = Completion(token_ids=(1,), logprobs=(-1.0,), versions=(0,), finish=finish, text="5")
    turn = Turn(context_ids=(1,), observation="?", completion=completion)
    task = env.task("train", 0, 0)
    return Episode(id="e", group="g", index=0, task=task, turns=(turn,), outcome="done", reward=reward)


async def test_a_claimed_mark_must_be_one_of_the_scale() -> None:
    env = environment("http://127.0.0.1:9")
    assert (await env.judge(episode(env, 1.0))).info == {"strict": 1.0, "lenient": 1.0}
    assert (await env.judge(episode(env, 1.0, "length"))).info == {"strict": 0.0, "lenient": 1.0}
    with pytest.raises(RecordError):
        await env.judge(episode(env, 0.3))
    assert (await environment("http://127.0.0.1:9", scale="0-10").judge(episode(env, 0.3))).reward == 0.3


class Wrong(BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        kind = self.path.split("/")[1]
        content = {"maybe": '{"mark": "maybe"}', "prose": "I like it.", "true": '{"mark": true}'}.get(kind, "")
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        if kind == "slow":
            threading.Event().wait(3)
        self.send_response(500 if kind == "error" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who is slow is not waited for
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def wrong() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("kind", ["maybe", "prose", "true", "error", "slow"])
async def test_a_judge_that_fails_gives_no_mark(wrong: str, kind: str) -> None:
    with pytest.raises(NetworkError):
        await mark(environment(f"{wrong}/{kind}", timeout_s=1.0), "5")


async def test_a_judge_that_is_not_there() -> None:
    with pytest.raises(NetworkError, match="does not answer"):
        await mark(environment("http://127.0.0.1:9"), "5")
    with pytest.raises(ConfigError, match="http"):
        environment("judge.example")
