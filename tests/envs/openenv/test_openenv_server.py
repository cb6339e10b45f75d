"""Against openenv's own servers, each a process in openenv's own environment: task lists, tools, exceptions.

`SHOAL_OPENENV` names that environment's Python. The how-to's environment, and a run on it: tests/docs/test_openenv.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from openenv_server import started
from shoal.envs.base import Environment
from shoal.envs.registry import make
from shoal.errors import NetworkError, TaskError

PYTHON = os.environ.get("SHOAL_OPENENV", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON, reason="needs an environment with openenv, its Python named by SHOAL_OPENENV"),
]

LISTED = """
import sys

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

TASKS = {"train": ["two", "three", "four"], "test": ["five"], "none": []}


class Say(Action):
    words: str


class Heard(Observation):
    asked: str = ""


class Listed(Environment[Say, Heard, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.word = ""

    def list_splits(self):
        return list(TASKS)

    def num_tasks(self, split):
        return len(TASKS[split])

    def reset(self, seed=None, episode_id=None, split="train", index=0, **kwargs):
        self.word = TASKS[split][index]
        return Heard(asked=self.word)

    def step(self, action, timeout_s=None, **kwargs):
        if action.words == "break":
            raise RuntimeError("it broke")
        return Heard(asked=self.word, reward=float(action.words == self.word), done=True)

    @property
    def state(self):
        return State()


app = create_app(Listed, Say, Heard, env_name="listed", max_concurrent_envs=2)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
"""

TOOLS = """
import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Observation, State


class Counter(MCPEnvironment):
    def __init__(self):
        self.count = 0
        server = FastMCP("counter")

        @server.tool
        def add(amount: int) -> str:
            "Add to the count."
            self.count += amount
            return f"the count is {self.count}"

        super().__init__(server)

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.count = (seed or 0) % 3
        return Observation(metadata={"task": f"Make {self.count} five."})

    def _step_impl(self, action, timeout_s=None, **kwargs):
        return Observation()

    async def step_async(self, action, timeout_s=None, **kwargs):
        seen = await super().step_async(action, timeout_s=timeout_s, **kwargs)
        return seen.model_copy(update={"reward": float(self.count == 5), "done": self.count >= 5})

    @property
    def state(self):
        return State()


app = create_app(Counter, CallToolAction, CallToolObservation, env_name="counter")
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
"""


def world(url: str, **settings: Any) -> Environment:
    return make("openenv", {"base_url": url, "timeout_s": 30.0} | settings, name="real")


def test_a_servers_own_list_of_tasks(tmp_path: Path) -> None:
    (tmp_path / "listed.py").write_text(LISTED)
    with started(PYTHON, tmp_path / "listed.py") as url:
        splits = {"train_split": "train", "heldout_split": "test"}
        env = world(url, form="text", action_key="words", observation_keys=["asked"], **splits)
        trained = {env.task("train", index, 0).id for index in range(40)}
        assert trained == {"train-0", "train-1", "train-2"}
        (held,) = env.heldout()
        assert held.data == {"split": "test", "index": 0}
        assert asyncio.run(env.score(held, ["five"])).reward == 1.0
        assert asyncio.run(env.score(held, ["four"])).reward == 0.0
        with pytest.raises(NetworkError, match="EXECUTION_ERROR: it broke"):
            asyncio.run(env.score(held, ["break"]))
        priced = world(url, form="text", action_key="words", error_reward=-1.0, **splits)
        assert asyncio.run(priced.score(held, ["break"])).reward == -1.0
        empty = world(url, form="text", action_key="words", train_split="none", heldout_split="test")
        with pytest.raises(TaskError, match="no task in its split 'none'"):
            empty.task("train", 0, 0)
        with pytest.raises(NetworkError, match="answers 500"):
            world(url, train_split="other", heldout_split="test").task("train", 0, 0)


def test_a_schemas_action_and_a_full_server(tmp_path: Path) -> None:
    (tmp_path / "listed.py").write_text(LISTED)

    async def many(env: Environment) -> float:
        async def one(index: int) -> float:
            task = env.task("train", index, 0)
            mine = env.fresh()
            opening = await mine.reset(task)
            asked = opening.messages[0].content.split('"')[3]
            assert opening.grammar is not None and '"words"' in opening.grammar.text
            refused = await mine.step('{"word": "four"}')
            assert refused.observation.startswith("That is no action here: words: Field required")
            return (await mine.step(json.dumps({"words": asked}))).reward

        return sum(await asyncio.gather(*(one(index) for index in range(6))))

    with started(PYTHON, tmp_path / "listed.py") as url:
        assert asyncio.run(many(world(url, parallel=6, train_split="train", heldout_split="test"))) == 6.0


def test_tools(tmp_path: Path) -> None:
    (tmp_path / "counter.py").write_text(TOOLS)

    async def play(env: Environment) -> None:
        task = env.task("train", 0, 0)
        opening = await env.reset(task)
        text = opening.messages[0].content
        assert f"Make {task.seed % 3} five." in text and "- add: Add to the count. Arguments: {" in text
        assert opening.grammar is not None
        assert "the tools are add" in (await env.step('{"tool": "multiply"}')).observation
        assert "error" in (await env.step('{"tool": "add", "arguments": {"amount": "many"}}')).observation
        added = await env.step('{"tool": "add", "arguments": {"amount": 1}}')
        assert (added.observation, added.reward, added.done) == (f"the count is {task.seed % 3 + 1}", 0.0, False)
        last = await env.step(json.dumps({"tool": "add", "arguments": {"amount": 4 - task.seed % 3}}))
        assert (last.reward, last.done, last.info) == (1.0, True, {"turns": 4.0, "refused": 1.0})

    with started(PYTHON, tmp_path / "counter.py") as url:
        asyncio.run(play(world(url, form="tool", observation_keys=["metadata"])))
