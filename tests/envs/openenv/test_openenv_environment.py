"""Episodes over OpenEnv's protocol, against a server that speaks it and misbehaves in every way that a test asks for.

What openenv's own servers do is tried where one is installed: `test_openenv_server`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from shoal.envs.base import Environment
from shoal.envs.openenv import session
from shoal.envs.registry import make
from shoal.errors import ConfigError, NetworkError, RecordError, TaskError
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion
from shoal.serving.server import listen

pytest.importorskip("websockets", reason="needs websockets: pip install 'shoal[openenv]'")

SCHEMA = {
    "type": "object",
    "properties": {"metadata": {"type": "object"}, "digit": {"type": "integer"}},
    "required": ["digit"],
    "additionalProperties": False,
}


class Guessing:
    """The protocol's server, its environment a digit to guess; `fault` says what goes wrong with the word it names."""

    def __init__(self, room: int = 4) -> None:
        self.room, self.open, self.most = room, 0, 0
        self.resets: list[dict[str, Any]] = []
        self.fault: dict[str, Any] = {}

    async def socket(self, socket: WebSocket) -> None:
        await socket.accept()
        if self.open >= self.room:
            await socket.send_json({"type": "error", "data": {"message": "no room", "code": "CAPACITY_REACHED"}})
            await socket.close()
            return
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await self.session(socket)
        except WebSocketDisconnect:
            pass
        finally:
            self.open -= 1

    async def session(self, socket: WebSocket) -> None:
        secret = guesses = 0
        while (asked := await socket.receive_json())["type"] != "close":
            if (fault := self.fault.get(asked["type"])) is not None:
                if fault == "hang":
                    await asyncio.sleep(1)
                await (socket.close() if fault == "close" else socket.send_text(fault))
                continue
            kind, data = asked["type"], asked["data"]
            if kind == "reset":
                self.resets.append(data)
                secret, guesses = data["seed"] % 10, 0
                seen = {"text": "Guess.", "metadata": {"number": len(self.resets)}}
                await socket.send_json({"type": "observation", "data": {"observation": seen, "reward": None}})
            elif not isinstance(data.get("digit"), int):
                errors = [{"loc": ["digit"], "msg": "it should be an integer"}]
                error = {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": errors}
                await socket.send_json({"type": "error", "data": error})
            else:
                guesses += 1
                right = data["digit"] == secret
                seen = {"text": "Yes." if right else "No.", "metadata": {"guesses": guesses}}
                answer = {"observation": seen, "reward": float(right), "done": right}
                await socket.send_json({"type": "observation", "data": answer})

    async def schema(self, _: Request) -> JSONResponse:
        return JSONResponse({"action": SCHEMA, "observation": {}, "state": {}})


@asynccontextmanager
async def serving(world: Guessing) -> AsyncIterator[str]:
    app = Starlette(routes=[WebSocketRoute("/ws", world.socket), Route("/schema", world.schema)])
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="websockets-sansio"))
    task = asyncio.create_task(server._serve([sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        sock.close()


def guessing(url: str, kind: str = "openenv", **settings: Any) -> Environment:
    return make(kind, {"base_url": url, "observation_keys": ["text"], "timeout_s": 60.0} | settings, name="guess")


def right(task: Task) -> str:
    return json.dumps({"digit": task.seed % 10})


async def test_an_episode_and_its_replay() -> None:
    world = Guessing()
    async with serving(world) as url:
        env = guessing(url, instruction="A digit.", system="Be brief.", reset={"level": 2}, parallel=4)
        task = env.task("train", 0, 7)
        opening = await env.reset(task)
        assert [message.role for message in opening.messages] == ["system", "user"]
        assert opening.messages[1].content.startswith("A digit.\n\nGuess.\n\nAnswer with one JSON object")
        assert opening.grammar is not None and list(json.loads(opening.grammar.text)["properties"]) == ["digit"]
        wrong = await env.step(f'{{"digit": {(task.seed + 1) % 10}}}')
        assert (wrong.observation, wrong.reward, wrong.done) == ("No.", 0.0, False)
        assert wrong.grammar == opening.grammar
        last = await env.step(f"I say {right(task)}!")
        assert (last.reward, last.done, last.info) == (1.0, True, {"turns": 2.0, "refused": 0.0})
        assert world.resets == [{"level": 2, "seed": task.seed}]
        again = await env.score(task, [f'{{"digit": {(task.seed + 1) % 10}}}', right(task)])
        assert (again.reward, again.done) == (1.0, True)
        await env.close()
        assert world.open == 0


async def test_a_senseless_action_is_answered() -> None:
    async with serving(Guessing()) as url:
        env = guessing(url, max_turns=3, constrain=False)
        assert (await env.reset(env.task("train", 0, 0))).grammar is None
        assert "no JSON object" in (await env.step("seven")).observation
        refused = await env.step('{"digit": "x"}')
        assert refused.observation == "That is no action here: digit: it should be an integer" and not refused.done
        ended = await env.step("{}")
        assert (ended.reward, ended.done, ended.info) == (0.0, True, {"turns": 3.0, "refused": 3.0})
        with pytest.raises(TaskError, match="outside an episode"):
            await env.step("{}")


async def test_a_reply_may_be_a_field() -> None:
    async with serving(Guessing()) as url:
        env = guessing(url, form="text", action_key="word")
        opening = await env.reset(env.task("train", 0, 0))
        assert (opening.messages[0].content, opening.grammar) == ("Guess.", None)
        assert "no action here" in (await env.step("seven")).observation
        await env.close()


async def test_no_more_sessions_than_allowed_and_a_full_server_is_asked_again() -> None:
    world = Guessing(room=2)

    async def episode(env: Environment, index: int) -> float:
        task = env.task("train", index, 0)
        await env.reset(task)
        await asyncio.sleep(0.02)
        return (await env.step(right(task))).reward

    async with serving(world) as url:
        one = guessing(url, parallel=1)
        assert sum(await asyncio.gather(*(episode(one.fresh(), index) for index in range(4)))) == 4 and world.most == 1
    async with serving(world) as url:
        many = guessing(url, parallel=8)
        assert sum(await asyncio.gather(*(episode(many.fresh(), index) for index in range(6)))) == 6 and world.most == 2
        assert world.open == 0
        blocking = [many.fresh(), many.fresh()]
        for index, env in enumerate(blocking):
            await env.reset(env.task("train", index, 0))
        late = guessing(url, parallel=8, timeout_s=0.5)
        with pytest.raises(NetworkError, match=r"CAPACITY_REACHED.*max_concurrent_envs"):
            await late.reset(late.task("train", 0, 0))
        for env in blocking:
            await env.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hang", "took longer than"),
        ("close", "ended the session"),
        ("?", "does not speak"),
        ('{"type": "state", "data": {}}', "instead of an observation"),
        ('{"type": "observation", "data": {"observation": 3}}', "does not speak"),
        ('{"type": "observation", "data": {"observation": {}, "reward": "much"}}', "does not speak"),
        ('{"type": "error", "data": {"message": "a bug", "code": "EXECUTION_ERROR"}}', "EXECUTION_ERROR: a bug"),
        ("[" * 100_000, "does not speak"),
        (json.dumps({"type": "observation", "data": {"observation": {"x": "y" * 5_000_000}}}), "ended the session"),
    ],
)
async def test_a_server_that_fails_is_no_fault_of_the_agent(fault: str, said: str) -> None:
    world = Guessing()
    async with serving(world) as url:
        for kind in ("reset", "step"):
            env = guessing(url, timeout_s=0.5 if fault == "hang" else 60.0)
            task = env.task("train", 0, 0)
            world.fault = {kind: fault}
            with pytest.raises(NetworkError, match=said):
                await env.score(task, [right(task)])
            world.fault = {}
            assert (await guessing(url).score(task, [right(task)])).done, "the slot was let go of"


async def test_an_environment_that_fails_may_have_a_price() -> None:
    world = Guessing()
    async with serving(world) as url:
        env = guessing(url, error_reward=-1.0)
        task = env.task("train", 0, 0)
        await env.reset(task)
        world.fault = {"step": '{"type": "error", "data": {"message": "a bug", "code": "EXECUTION_ERROR"}}'}
        step = await env.step(right(task))
        assert (step.reward, step.done, step.info) == (-1.0, True, {"turns": 1.0, "refused": 1.0})


async def test_nobody_there() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    env = guessing(f"http://127.0.0.1:{port}")
    with pytest.raises(NetworkError, match=r"does not answer.*Start it"):
        await env.reset(env.task("train", 0, 0))
    await env.close()


def test_held_out_seeds_are_never_trained_on() -> None:
    env = guessing("http://127.0.0.1:1")
    heldout = env.heldout(200)
    assert len(heldout) == 200 and heldout == guessing("http://127.0.0.1:1").heldout(200)
    trained = [env.task("train", index, 3) for index in range(500)]
    assert {task.seed for task in trained}.isdisjoint(task.seed for task in heldout)
    assert trained[0] == env.task("train", 0, 3) != env.task("train", 0, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "127.0.0.1:8000"}, "http://"),
        ({"form": "text"}, "action_key"),
        ({"action_key": "word"}, "action_key"),
        ({"train_split": "train"}, "two splits"),
        ({"train_split": "a", "heldout_split": "a"}, "two splits"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make("openenv", {"base_url": "http://127.0.0.1:1"} | settings)


def test_without_the_package_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"websockets.*shoal\[openenv\]"):
        guessing("http://127.0.0.1:1")


async def test_a_live_one_takes_a_worker_at_its_word() -> None:
    env = guessing("http://127.0.0.1:1", "openenv_live", max_turns=2)
    turn = Turn(
        context_ids=(1,),
        observation="Guess.",
        completion=Completion(token_ids=(2,), logprobs=(-1.0,), versions=(0,), finish="stop", text="{}"),
    )
    task = env.task("train", 0, 0)
    episode = Episode(id="a", group="g", index=0, task=task, turns=(turn,), outcome="done", reward=0.5)
    assert (await env.judge(episode)).reward == 0.5
    with pytest.raises(RecordError, match="3 turns"):
        await env.judge(replace(episode, turns=(turn,) * 3))
