"""Files that users are given, and what the API is sent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from random import Random
from typing import Any

import numpy as np
from fuzz_registry import scratch, target, text_of, written
from fuzz_samples import as_json, plain
from safetensors.numpy import save

from shoal.agents.gaia.dataset import read as read_gaia
from shoal.agents.tools.mcp_json import read_agents, read_mcp_json
from shoal.config.load import config_from, load_config
from shoal.engine.pipeline.weights import chosen
from shoal.engine.source import LocalModel
from shoal.envs.evm.definition import read_tasks
from shoal.envs.registry import make
from shoal.errors import ShoalError
from shoal.lab.network import load_network
from shoal.learner.examples import read_examples
from shoal.planning.fleet import load_fleet
from shoal.protocol.episode import Episode
from shoal.serving.dialect import Dialect
from shoal.serving.errors import ApiError
from shoal.serving.reading import Reader
from shoal.serving.responses import ResponseBody
from shoal.serving.schema import ChatBody, CompletionBody, EmbeddingBody, parsed

SAMPLES = 40

CONFIG = b"""[run]
name = "x"
steps = 2
[model]
name = "embedded"
[envs.a]
type = "arithmetic"
[rollout]
group_size = 8
[learner]
mode = "async"
lr = 2e-5
[learner.loss]
type = "grpo"
[eval]
questions = 10
"""


@target(lambda: [CONFIG])
def configuration(data: bytes) -> None:
    load_config(written("run.toml", data))


@target(lambda: [b"--learner.lr\n2e-6\n--run.steps=10", b"--envs.a.settings={a=1}"])
def overrides(data: bytes) -> None:
    config_from({"envs": {"a": {"type": "arithmetic"}}}, text_of(data).split("\n"))


SERVERS = {"a": {"command": "x", "args": ["y"], "env": {"A": "${HOME}"}, "shoal": {"idempotent": True}}}
AGENTS = {"b": {"url": "http://127.0.0.1:1/v1", "description": "d", "model": "m"}}


@target(lambda: [as_json({"mcpServers": SERVERS, "agents": AGENTS}), as_json({"servers": SERVERS})])
def mcp_json(data: bytes) -> None:
    path = written("mcp.json", data)
    read_mcp_json(path)
    read_agents(path)


NETWORK = b"""seed = 1
[[nodes]]
name = "a"
up_mbps = 10
delay_ms = 5
[[nodes]]
name = "b"
[[paths]]
source = "a"
target = "b"
loss = 0.1
[[events]]
action = "cut"
source = "a"
target = "b"
at_s = 2
"""


@target(lambda: [NETWORK])
def network(data: bytes) -> None:
    load_network(written("network.toml", data))


FLEET = b"""[run]
rollouts_per_step = 64
train_s = 10
snapshot_mb = 9.0
[learner]
price_usd_per_hour = 2.0
[[workers]]
name = "a"
count = 4
rollouts_per_s = 0.5
[colocated]
price_usd_per_hour = 3
rollouts_per_s = 9
"""


@target(lambda: [FLEET])
def fleet(data: bytes) -> None:
    load_fleet(written("fleet.toml", data))


def _quests() -> list[bytes]:
    folder = resources.files("shoal.envs.evm.tasks")
    texts = [entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".toml")]
    return [text[:3000].rpartition("[[task]]")[0].encode() for text in sorted(texts)]


@target(_quests)
def quests(data: bytes) -> None:
    read_tasks(text_of(data), "tasks.toml")


ROWS = b"""{"question": "1+1?", "answer": "2 #### 2"}
{"question": "b", "answer": "4", "choices": ["x", "y"]}
{"question": "c", "answer": "5"}
"""


@target(lambda: [ROWS, ROWS.replace(b'"4"', b'"A"')])
def questions(data: bytes) -> None:
    path = written("questions.jsonl", data)
    for grader in ("number", "choice", "exact"):
        with suppress(ShoalError):
            make("jsonl", {"path": str(path), "grader": grader}).task("train", 0, 0)


def _episodes() -> list[bytes]:
    draw = Random(8)
    chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    return [chat, b'{"prompt": "a", "completion": "b"}', *(as_json(plain(Episode, draw)) for _ in range(SAMPLES))]


class _Letters:
    """A tokenizer of characters, so that no model is needed."""

    end_of_turn = 1

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        return [2 + ord(char) % 250 for message in messages for char in message.content]

    def encode(self, text: str) -> list[int]:
        return [2 + ord(char) % 250 for char in text]

    def continuation(self, act: Sequence[int], shown: str) -> list[int]:
        return self.encode(shown)


@target(_episodes)
def examples(data: bytes) -> None:
    read_examples(written("examples.jsonl", data), _Letters(), max_tokens=256, min_reward=0.0)  # type: ignore[arg-type]


def _checkpoints() -> list[bytes]:
    return [save({"model.embed_tokens.weight": np.zeros((4, 2), np.float32), "b": np.ones(3, np.uint16)})]


@target(_checkpoints)
def safetensors_file(data: bytes) -> None:
    """A checkpoint's file, as a model of somebody else brings it."""
    folder = scratch() / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(data)
    model = LocalModel("m", folder)
    chosen(model, {"model.embed_tokens.weight": (4, 2)})


@target(lambda: [b'{"task_id": "a", "Question": "q", "Level": 1, "Final answer": "x", "file_name": ""}\n'])
def gaia(data: bytes) -> None:
    folder = scratch() / "gaia" / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_bytes(data)
    read_gaia(folder.parent)


# The API.

PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWERED = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "1"},
]
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "max_tokens": 5,
    "temperature": 0.5,
    "tools": [TOOL],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PARAMETERS}},
    "stream": True,
}
PROMPT = {"model": "m", "prompt": ["a"], "n": 2, "logprobs": 3, "stop": ["x"]}
EMBEDDED = {"model": "m", "input": ["a"], "encoding_format": "base64"}
ASKED = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}

BODIES = (ChatBody, CompletionBody, EmbeddingBody, ResponseBody)


def _bodies() -> list[bytes]:
    sent = [(0, CHAT), (1, PROMPT), (2, EMBEDDED), (3, ASKED), (0, {"model": "m", "messages": ANSWERED})]
    return [bytes([number]) + as_json(body) for number, body in sent]


@target(_bodies)
def api_body(data: bytes) -> None:
    if not data:
        return
    try:
        body = parsed(data[1:], BODIES[data[0] % len(BODIES)])
        if isinstance(body, ResponseBody):
            body = body.as_chat()
        if isinstance(body, ChatBody):
            for template in ("<tool_call>", "[TOOL_CALLS]", ""):
                dialect = Dialect.of(template)
                dialect.messages(body.messages, body.tools or ())
                if body.tools:
                    dialect.grammar(body.tools, must_call=False, parallel=True)
    except ApiError:
        return


def _tools() -> list[Any]:
    return list(parsed(as_json(CHAT), ChatBody).tools or ())


@target(
    lambda: [
        b'\0a <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> b',
        b'\1[TOOL_CALLS][{"name": "f", "arguments": {}}]',
        b'\2{"name": "f", "parameters": {}}',
        b"\0<think>so</think>\n\nyes",
    ]
)
def model_reply(data: bytes) -> None:
    """What a model writes, read as calls and reasoning, whole and in pieces."""
    if not data:
        return
    dialect = Dialect.of(("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")[data[0] % 3])
    text, tools = text_of(data[1:]), _tools()
    dialect.read(text, tools)
    reader = Reader(dialect, tools, thinking=bool(data[0] & 4))
    for at in range(0, len(text), 7):
        reader.push(text[at : at + 7])
    reader.rest()
