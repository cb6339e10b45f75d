"""The browser and the page builder, in a real Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from agent_cases import House, answer, plan, results
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from test_web_tools import perform, site

from shoal.agents.builtin.pages import HOST, site_of
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Call, Decision
from shoal.agents.tools.caller import CALLER
from shoal.agents.tools.outcome import Failure, Success
from shoal.envs.web.browser import BrowserError, close_browser, require_browser
from shoal.envs.web.gate import Request as Asked

try:
    require_browser()
except BrowserError as error:
    pytest.skip(f"no browser on this machine: {error.problem}", allow_module_level=True)

from shoal.agents.builtin.browser import browser_tools
from shoal.agents.builtin.pages import page_tools

FORM = """<title>Shop</title><h1>Shop</h1><form action=/page>
<label>Item <input name=item></label>
<label>Size <select name=size><option>small<option>large</select></label>
<button>Order</button></form><p>{said}</p><a href='http://elsewhere.example/'>away</a>"""


@asynccontextmanager
async def shop() -> AsyncIterator[str]:
    async def page(request: Request) -> Response:
        seen = request.cookies.get("item", "nothing")
        asked = request.query_params.get("item", "")
        said = f"Ordered: {asked} {request.query_params['size']}" if asked else f"Before: {seen}"
        response = HTMLResponse(FORM.format(said=said))
        if asked:
            response.set_cookie("item", asked)
        return response

    async with site(page=page) as host:
        yield host
    await close_browser()


def ids(tree: str) -> dict[str, str]:
    """Words of an element -> its number."""
    lines = (line.strip() for line in tree.split("\n") if line.strip().startswith("["))
    return {line.partition(" ")[2]: line[1:].partition("]")[0] for line in lines}


@pytest.mark.slow
async def test_a_run_drives_the_browser_and_another_sees_none_of_it(tmp_path: Path) -> None:
    async with shop() as host:
        tools = browser_tools((host,))
        # The browser starts here, however long that takes, and not within a run.
        assert isinstance(await perform(tools, "navigate", url=f"http://{host}/page"), Success)

        def number(view: View, words: str) -> str:
            tree = view.value(view.steps[-1].calls[-1])["tree"]  # type: ignore[index]
            return next(one for line, one in ids(tree).items() if words in line)

        def order(view: View) -> Decision:
            def act(tool: str, **arguments: Any) -> Decision:
                return plan(Call(id="", tool=tool, arguments=arguments))

            match len(view.steps):
                case 0:
                    return act("navigate", url=f"http://{host}/page")
                case 1:
                    return act("type_text", id=number(view, "textbox"), text="a lamp")
                case 2:
                    return act("select_option", id=number(view, "combobox"), option="large")
                case 3:
                    return act("click", id=number(view, "button"))
                case 4:
                    return act("go_back")
            last = view.value(view.steps[3].calls[-1])
            return answer(last["tree"])  # type: ignore[index]

        def look(view: View) -> Decision:
            if not view.steps:
                return plan(Call(id="", tool="navigate", arguments={"url": f"http://{host}/page"}))
            return answer(view.value(view.steps[0].calls[0])["tree"])  # type: ignore[index]

        for folder, script, words in (("one", order, "Ordered: a lamp large"), ("two", look, "Before: nothing")):
            (tmp_path / folder).mkdir()
            async with House(tmp_path / folder, tools, ScriptedPolicy(script)) as house:
                events = await house.run(approve="none")
            assert words in events[-1].data["answer"], results(events)
        CALLER.set("third")
        refused = await perform(tools, "navigate", url="http://elsewhere.example/")
        assert not isinstance(refused, Success) or "403" in str(refused.value) or "elsewhere" in refused.value["tree"]
        for wrong in ({"id": "9999"}, {"id": "x"}):
            assert isinstance(await perform(tools, "click", **wrong), Failure)


@pytest.mark.slow
async def test_a_page_is_built_checked_and_mended(tmp_path: Path) -> None:
    tools = page_tools(tmp_path)
    broken = "<!doctype html><link rel=stylesheet href=main.css><h1>Our shop</h1><script>nothing()</script>"
    assert isinstance(await perform(tools, "write_file", name="index.html", content=broken), Success)
    found = await perform(tools, "check_page", name="index.html", selectors=["h1", "nav a"], texts=["Our shop", "Open"])
    assert isinstance(found, Success) and not found.value["ok"]
    assert found.value["missing_files"] == ["main.css"] and found.value["missing_selectors"] == ["nav a"]
    assert found.value["missing_texts"] == ["Open"] and "nothing is not defined" in str(found.value["console_errors"])
    mended = broken.replace("nothing()", "document.title='Shop'") + "<nav><a href=#>Open</a></nav>"
    for name, content in (("index.html", mended), ("main.css", "h1 { color: red }")):
        assert isinstance(await perform(tools, "write_file", name=name, content=content), Success)
    found = await perform(tools, "check_page", name="index.html", selectors=["h1", "nav a"], texts=["Our shop", "Open"])
    assert isinstance(found, Success) and found.value["ok"] and found.value["title"] == "Shop", found
    outside = mended + "<script src='https://cdn.example.org/x.js'></script>"
    await perform(tools, "write_file", name="index.html", content=outside)
    found = await perform(tools, "check_page", name="index.html")
    assert isinstance(found, Success) and found.value["outside_hosts"] == ["cdn.example.org"]
    await close_browser()


async def test_a_builder_stays_in_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.html").write_text("secret")
    (root / "link.html").symlink_to(tmp_path / "secret.html")
    tools = page_tools(root)
    for name in ("../secret.html", "/etc/passwd.html", "link.html", "a.py", "a\0.html"):
        for act in ({"tool": "read_file"}, {"tool": "write_file", "content": "x"}):
            found = await perform(tools, act.pop("tool"), name=name, **act)
            assert isinstance(found, Failure), (name, act)
    assert (tmp_path / "secret.html").read_text() == "secret"
    missing: list[str] = []
    answer_ = site_of(root, missing)
    (root / "index.html").write_text("<h1>hi</h1>")
    assert b"hi" in answer_(Asked("GET", HOST, "/", "", b"")).body
    for path in ("/../secret.html", "/link.html", "/%2e%2e/secret.html", "/a%00.css", "/nothing.css"):
        assert answer_(Asked("GET", HOST, path, "", b"")).status == 404
    assert "nothing.css" in missing
    await asyncio.sleep(0)
