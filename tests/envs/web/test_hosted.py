"""Task files of WebArena and WebVoyager: read, asked on a server, and judged as the files say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from shoal.envs.registry import make
from shoal.envs.web.hosted import HostedWeb
from shoal.envs.web.hosted_tasks import Words, holds, is_at, read_hosted
from shoal.errors import NetworkError, TaskError
from shoal.serving.server import listen

SITES = {"shopping": "http://127.0.0.1:7770/"}


def arena(number: int, **evaluation: Any) -> dict[str, Any]:
    return {
        "task_id": number,
        "sites": ["shopping"],
        "start_url": "__SHOPPING__/start",
        "intent": f"Task {number}",
        "eval": {"eval_types": ["string_match"], "reference_answers": None, "reference_url": "", **evaluation},
    }


def write(path: Path, tasks: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(tasks))
    return path


def test_a_webarena_file(tmp_path: Path) -> None:
    html = {"url": "last", "locator": "document.title", "required_contents": {"must_include": ["A |OR| B"]}}
    tasks = [
        arena(0, reference_answers={"exact_match": "Blue", "must_include": ["x", "y"]}),
        arena(1, eval_types=["url_match"], reference_url="__SHOPPING__/a?b=1 |OR| __SHOPPING__/c"),
        arena(2, eval_types=["program_html"], program_html=[html]),
        arena(3, reference_answers={"fuzzy_match": ["about ten"]}),
        arena(4, reference_answers={"fuzzy_match": "N/A"}),
        arena(5, eval_types=["program_html"], program_html=[{**html, "locator": "func:shopping_get()"}]),
        {**arena(6), "start_url": "__REDDIT__"},
    ]
    path = write(tmp_path / "arena.json", tasks)
    found = read_hosted(path, SITES, judge=False)
    assert [task.id for task in found.tasks] == ["0", "1", "2", "4"]
    assert found.left_out == {
        "needs a judge": 1,
        "a check is a function of WebArena's helpers": 1,
        "site reddit is not named": 1,
    }
    first, second, third, last = found.tasks
    assert first.start == "http://127.0.0.1:7770/start" and first.answer == Words("Blue", ("x", "y"))
    assert second.urls == ("http://127.0.0.1:7770/a?b=1", "http://127.0.0.1:7770/c")
    assert third.pages[0].words.included == ("A |OR| B",)
    assert last.answer == Words("N/A")
    assert [task.id for task in read_hosted(path, SITES, judge=True).tasks] == ["0", "1", "2", "3", "4"]


def test_a_webvoyager_file(tmp_path: Path) -> None:
    path = tmp_path / "voyager.jsonl"
    path.write_text(json.dumps({"web_name": "W", "id": "W--0", "ques": "What?", "web": "https://w.test/"}) + "\n")
    (task,) = read_hosted(path, {}, judge=True).tasks
    assert (task.id, task.start, task.instruction, task.judged) == ("W--0", "https://w.test/", "What?", True)
    with pytest.raises(TaskError, match="needs a judge"):
        read_hosted(path, {}, judge=False)


@pytest.mark.parametrize("text", ["", "[]", "{", '[{"intent": "x"}]', '[{"id": 3}]', "[3]"])
def test_what_is_no_task_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(TaskError):
        read_hosted(path, SITES, judge=True)
    with pytest.raises(TaskError, match="cannot be read"):
        read_hosted(tmp_path / "nothing", SITES, judge=True)


def test_comparisons_are_webarenas() -> None:
    assert holds(Words(exact="Blue"), " 'blue' ") and not holds(Words(exact="Blue"), "dark blue")
    assert holds(Words(included=("a |OR| b", "C")), "c &amp; B") and not holds(Words(included=("a", "z")), "a")
    assert is_at("http://a.test/x/?p=1&q=2", ["http://a.test/x?q=2"]) and is_at("http://b.test/", [])
    assert not is_at("http://a.test/x?q=3", ["http://a.test/x?q=2"]) and not is_at(
        "http://b.test/x", ["http://a.test/x"]
    )


async def _home(_: Request) -> HTMLResponse:
    return HTMLResponse("<title>Shop</title><h1>Shop</h1><a href=/mug>Mug</a><p>A mug costs 7 pounds.</p>")


async def _mug(_: Request) -> HTMLResponse:
    return HTMLResponse("<title>Mug</title><h1>Mug</h1><p>7 pounds</p>")


async def _judge(request: Request) -> JSONResponse:
    asked = (await request.json())["messages"][0]["content"]
    mark = "yes" if "seven" in asked or "Mug" in asked else "no"
    return JSONResponse({"choices": [{"message": {"content": json.dumps({"mark": mark})}}]})


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """A small shop and a judge, on loopback."""
    app = Starlette(
        routes=[Route("/", _home), Route("/mug", _mug), Route("/v1/chat/completions", _judge, methods=["POST"])]
    )
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([sock]))
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await task


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("chromium")
async def test_tasks_on_a_server(tmp_path: Path) -> None:
    locator = {"url": "last", "locator": "document.querySelector('p').innerText", "required_contents": {}}
    locator["required_contents"] = {"must_include": ["7"]}
    async with served() as port:
        at = f"http://127.0.0.1:{port}"
        tasks = [
            arena(0, reference_answers={"must_include": ["7"]}),
            arena(1, eval_types=["url_match", "program_html"], reference_url=f"{at}/mug", program_html=[locator]),
            arena(2, reference_answers={"fuzzy_match": ["seven pounds"]}),
        ]
        for task in tasks:
            task["start_url"] = f"{at}/"
        path = write(tmp_path / "tasks.json", tasks)
        judge = {"base_url": f"{at}/v1", "model": "judge"}
        settings = {"file": str(path), "sites": {"shopping": at}, "judge": judge, "max_steps": 3}
        env = make("web_hosted", settings, name="arena")
        assert isinstance(env, HostedWeb)
        asked = {task.id: task for side in ("train", "heldout") for task in _tasks(env, side)}
        assert set(asked) == {"0", "1", "2"}
        for number, acts, reward in (
            ("0", ["stop [It is 7.]"], 1.0),
            ("0", ["stop [no idea]"], 0.0),
            ("1", ["MUG", "stop"], 1.0),
            ("1", ["stop"], 0.0),
            ("2", ["stop [seven]"], 1.0),
            ("0", ["scroll [down]", "click [99]", "hello"], 0.0),
        ):
            opening = await env.reset(asked[number])
            said = opening.messages[0].content
            assert "StaticText" in said and "[" in said
            for act in acts:
                link = next(line for line in said.splitlines() if "link 'Mug'" in line) if act == "MUG" else ""
                step = await env.step(f"click {link.strip().split()[0]}" if link else act)
            assert (step.done, step.reward) == (True, reward), (number, acts)
        await env.close()
    with pytest.raises(NetworkError):
        await env._judged(env.hosted.tasks[2], _page(), "twelve")


def _tasks(env: HostedWeb, side: Any) -> list[Any]:
    try:
        return [env.task(side, index, 0) for index in range(12)]
    except TaskError:
        return []


def _page() -> Any:
    from shoal.envs.web.tree import Node, Page

    return Page(url="u", root=Node(role="RootWebArea"))
