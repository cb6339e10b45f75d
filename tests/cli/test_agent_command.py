"""`shoal agent` and `shoal tools`, as a user calls them; the model that decides is an endpoint of the test's."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from deciding import deciding
from shoal.agents.scheduler.records import Call, RunEvent, RunRequest
from shoal.agents.scheduler.state import RunState
from shoal.cli.agent_serving import admitted
from shoal.cli.agent_tree import tree_of
from shoal.cli.app import main
from shoal.protocol.codec import builtins, read_jsonl
from shoal.protocol.episode import Episode


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_a_task_is_done_with_a_built_in_tool_and_kept_in_the_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = ("--log", str(tmp_path / "runs.db"))
    calls = [
        {"id": "a", "tool": "calculator.calculate", "arguments": {"expression": "37 * 41"}},
        {"id": "b", "tool": "calculator.calculate", "arguments": {"expression": "1 / 0"}},
    ]
    with deciding({"calls": calls}, {"answer": "1517"}) as url:
        done = run(capsys, "agent", "37 * 41?", "--builtin", "calculator", "--endpoint", url, *log)
    assert done["answer"] == "1517" and done["spent"]["tokens"] == 30 and len(done["calls"]) == 2
    with deciding({"answer": "again"}) as url:
        event = next(n for n in range(1, done["last_event"]) if n > 3)
        forked = run(
            capsys, "agent", "--fork", f"{done['id']}:{event}", "--endpoint", url, *log, "--builtin", "calculator"
        )
    assert forked["answer"] == "again"
    listed = run(capsys, "agent", "--list", *log)["runs"]
    assert {(one["run"], one["status"]) for one in listed} == {(done["id"], "done"), (forked["id"], "done")}
    with deciding() as url:
        assert run(capsys, "agent", "--resume", done["id"], "--endpoint", url, *log, "--builtin", "calculator") == done


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = ("--log", str(tmp_path / "runs.db"))
    for arguments, words in (
        (("agent", *log), "nothing to do"),
        (("agent", "t", "--builtin", "chess", *log), "chess"),
        (("agent", "t", "--builtin", "corpus", *log), "need a folder"),
        (("agent", "t", "--tools", str(tmp_path / "no.json"), *log), "cannot be read"),
        (("agent", "t", "--steps", "0", *log), "out of range"),
        (("agent", "t", "--episode", "e.jsonl", "--endpoint", "http://127.0.0.1:9/v1", *log), "no token"),
        (("agent", "--port", "0", "--host", "0.0.0.0", "--keys", str(tmp_path / "none"), *log), "everybody"),
        (("tools", "list", str(tmp_path / "no.json")), "cannot be read"),
    ):
        assert words in run(capsys, *arguments, code=2)["error"]["problem"]
    for named, words in (((), "no tools are named"), (("web", "--search-url", "searx"), "no address of a search")):
        assert main(["tools", "serve", *named]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_key_is_shown_once_and_kept_as_a_hash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = run(capsys, "agent", "--new-key", "alice", "--keys", str(file))
    assert made["key"].startswith("sk-shoal-") and made["key"] not in file.read_text()
    keys = admitted(file, "0.0.0.0")
    assert keys.owner(made["key"]) == "alice" and keys.owner("sk-shoal-no") is None


@pytest.mark.slow
async def test_an_agent_is_served_to_the_official_client(tmp_path: Path) -> None:
    calls = [{"id": "a", "tool": "calculator.calculate", "arguments": {"expression": "37 * 41"}}]
    with deciding({"calls": calls}, {"answer": "1517"}) as url:
        command = ["-m", "shoal.cli", "agent", "serve", "--name", "counter", "--about", "Counts.", "--endpoint", url]
        command += ["--builtin", "calculator", "--log", str(tmp_path / "runs.db")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SHOAL_HOME": str(tmp_path)}
        server = StdioServerParameters(command=sys.executable, args=command, env=environment)
        async with asyncio.timeout(100), Client(server) as client:
            (listed,) = (await client.list_tools()).tools
            assert (listed.name, listed.description) == ("counter", "Counts.")
            found = await client.call_tool("counter", {"task": "37 * 41?"})
    assert found.structured_content is not None
    assert found.structured_content["answer"] == "1517" and found.structured_content["calls"] == 1


@pytest.mark.slow
def test_a_run_is_added_to_a_file_of_episodes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, agent_model: Path
) -> None:
    file = tmp_path / "episodes.jsonl"
    command = ("agent", "What is 2 + 2?", "--model", str(agent_model), "--steps", "2", "--reward", "0.25")
    for _ in range(2):
        main([*command, "--episode", str(file), "--log", str(tmp_path / "runs.db"), "--json"])
    episodes = list(read_jsonl(file, Episode))
    assert len(episodes) == 2 and episodes[0].id != episodes[1].id
    assert all(one.num_tokens and one.task.data == {"task": "What is 2 + 2?"} for one in episodes)
    assert all(one.reward == (0.25 if one.outcome == "done" else 0.0) for one in episodes)
    capsys.readouterr()


@pytest.fixture(scope="module")
def agent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, with a chat template."""
    sys.path.append(str(Path(__file__).parents[1] / "engine"))
    from engine_cases import PLAIN, make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("agent") / "model", PLAIN, max_position_embeddings=4096)


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cli.tools.PACKAGES", ("a_package_that_nobody_has",))
    for arguments in (("agent", "t"), ("tools", "list")):
        error = run(capsys, *arguments, code=2)["error"]
        assert "a_package_that_nobody_has" in error["problem"] and "shoal[agents]" in error["remedy"]


def test_the_built_in_tools_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "calculator" in run(capsys, "tools", "list")["builtin"]


def test_the_tree_shows_every_call_and_nothing_as_markup() -> None:
    from rich.console import Console

    state = RunState()
    request = builtins(RunRequest(task="[red]a task[/red]\x1b[31m"))
    calls = [{"call": builtins(Call(id=f"c{n}", tool="add", arguments={})), "background": False} for n in range(3)]
    failed = {"kind": "error", "message": "no\x07", "retryable": False, "retry_after_s": 0.0}
    story: list[tuple[Any, dict[str, Any]]] = [
        ("run", {"request": request}),
        ("thought", {"step": 1, "seen": 1, "text": "think", "tokens_in": 1, "tokens_out": 1, "usd": 0.0}),
        ("plan", {"step": 1, "calls": calls, "answer": None}),
        ("result", {"call": "c0", "ok": True, "value": "[bold]3", "seconds": 0.1}),
        ("result", {"call": "c1", "ok": False, "error": failed, "seconds": 0.1}),
    ]
    for seq, (kind, data) in enumerate(story, start=1):
        state.apply(RunEvent(run="r", seq=seq, time=0.0, kind=kind, data=data))
    written = io.StringIO()
    Console(file=written, width=100).print(tree_of(state))
    text = written.getvalue()
    assert "[red]a task[/red]" in text and "✓ c0 add → [bold]3" in text and "✗ c1 add → error: no" in text
    assert "… c2 add" in text and "\x1b" not in text and "\x07" not in text
