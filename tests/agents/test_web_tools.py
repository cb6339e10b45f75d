"""Searching and reading the web: results as services give them, and what is never asked."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from shoal.agents.builtin import fetch as fetch_module
from shoal.agents.builtin.fetch import fetch, is_public, public_address
from shoal.agents.builtin.web import read_results, web_tools
from shoal.agents.tools.function import ToolError
from shoal.agents.tools.outcome import Failure, Outcome, Success
from shoal.serving.server import listen


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("ff02::1", "localhost", "", "255.255.255.255", "192.0.2.1"),
    ],
)
def test_addresses_that_are_not_the_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=6, network="fc00::/7"))
def test_no_private_address_is_public(address: object) -> None:
    assert not is_public(str(address)) and not is_public(f"::ffff:{address}")


@asynccontextmanager
async def site(**pages: Callable[[Request], Awaitable[Response]]) -> AsyncIterator[str]:
    """A server on loopback; gives its HOST:PORT."""
    listening = listen("127.0.0.1", 0)
    app = Starlette(routes=[Route(f"/{name}", page) for name, page in pages.items()])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.create_task(server._serve([listening]))
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listening.close()


async def perform(tools: Any, called: str, /, **arguments: Any) -> Outcome:
    (found,) = (one for one in tools if one.card.name == called)
    outcome: Outcome = await found.call(arguments, lambda _: None)
    return outcome


async def test_only_allowed_hosts_inside_are_asked_and_a_redirect_is_no_way_in() -> None:
    asked: list[str] = []

    async def inner(request: Request) -> Response:
        asked.append(request.url.path)
        return HTMLResponse("<title>t</title><p>inside")

    async with site(inner=inner) as private:

        async def outer(_: Request) -> Response:
            return RedirectResponse(f"http://{private}/inner")

        async def loop(_: Request) -> Response:
            return RedirectResponse("/loop")

        async with site(outer=outer, loop=loop) as host:
            for url in (f"http://{private}/inner", f"http://localhost:{private.split(':')[1]}/inner"):
                with pytest.raises(ToolError, match="not public"):
                    await fetch(url)
            with pytest.raises(ToolError, match="not public"):
                await fetch(f"http://{host}/outer", allow=[host])
            assert not asked
            found = await fetch(f"http://{host}/outer", allow=[host, private])
            assert "inside" in found.text and found.url.endswith("/inner") and asked == ["/inner"]
            with pytest.raises(ToolError, match="redirects"):
                await fetch(f"http://{host}/loop", allow=[host])
    for url in ("file:///etc/passwd", "ftp://example.org/x", "http://user:secret@example.org/", "nonsense"):
        with pytest.raises(ToolError, match="no address of a page"):
            await fetch(url)


async def test_the_address_that_was_looked_at_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere when it is asked again is asked once."""
    looked: list[str] = []

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        looked.append(host)
        address = "93.184.216.34" if len(looked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    assert await public_address(httpx.URL("http://rebind.example/"), ()) == "93.184.216.34"
    with pytest.raises(ToolError, match="not public"):
        await public_address(httpx.URL("http://rebind.example/"), ())
    assert looked == ["rebind.example"] * 2


async def test_what_is_too_large_too_slow_or_an_error_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def large(_: Request) -> Response:
        return Response(b"x" * 10_000)

    async def slow(_: Request) -> Response:
        await asyncio.sleep(1)
        return Response(b"")

    async def busy(_: Request) -> Response:
        return Response(b"", 503)

    monkeypatch.setattr(fetch_module, "TIMEOUT_S", 0.5)
    async with site(large=large, slow=slow, busy=busy) as host:
        with pytest.raises(ToolError, match="more than 5000"):
            await fetch(f"http://{host}/large", allow=[host], max_bytes=5000)
        for page, words in (("slow", "no answer|ReadTimeout"), ("busy", "503"), ("missing", "404")):
            with pytest.raises(ToolError, match=words) as caught:
                await fetch(f"http://{host}/{page}", allow=[host])
            assert caught.value.retryable == (page != "missing")


async def test_searching_and_reading_by_a_service_of_the_users() -> None:
    async def search(request: Request) -> Response:
        assert request.query_params["format"] == "json"
        words = request.query_params["q"]
        found = [{"title": f"{words} {n}", "url": f"https://example.org/{n}", "content": "a\n b"} for n in range(9)]
        return JSONResponse({"query": words, "results": found})

    async def page(_: Request) -> Response:
        return HTMLResponse("".join(f"<p>paragraph {n} of this page</p>" for n in range(400)))

    async def image(_: Request) -> Response:
        return Response(b"\x89PNG", media_type="image/png")

    async with site(search=search, page=page, image=image) as host:
        tools = web_tools(f"http://{host}", [host])
        found = await perform(tools, "search_web", query="whales & co", count=3)
        assert isinstance(found, Success) and len(found.value) == 3
        assert found.value[0] == {"title": "whales & co 0", "url": "https://example.org/0", "snippet": "a b"}
        first = await perform(tools, "read_page", url=f"http://{host}/page")
        assert isinstance(first, Success) and first.value["chunks"] > 1 and "paragraph 0 of" in first.value["text"]
        last = await perform(tools, "read_page", url=f"http://{host}/page", chunk=first.value["chunks"] - 1)
        assert isinstance(last, Success) and "paragraph 399" in last.value["text"]
        for wrong in ({"chunk": 99}, {"url": f"http://{host}/image"}):
            assert isinstance(await perform(tools, "read_page", **{"url": f"http://{host}/page", **wrong}), Failure)
        # The service was named by the user; the pages that it finds were not.
        reading = web_tools(f"http://{host}")
        assert isinstance(await perform(reading, "search_web", query="whales"), Success)
        assert isinstance(await perform(reading, "read_page", url=f"http://{host}/page"), Failure)
    assert [tool.card.name for tool in web_tools()] == ["read_page"]  # type: ignore[attr-defined]


def test_results_are_read_as_services_write_them() -> None:
    one = {"title": "T", "link": "https://a.org/x", "snippet": "s"}
    for answer in ({"items": [one]}, {"organic": [one]}, {"web": {"results": [one]}}):
        (found,) = read_results(json.dumps(answer), "https://s.org/")
        assert (found.title, found.url, found.snippet) == ("T", "https://a.org/x", "s")
    page = "<a href='/next'>next</a><a href='https://a.org/x'>The <b>answer</b></a><a href='javascript:x()'>no</a>"
    (found,) = read_results(page, "https://s.org/search")
    assert (found.title, found.url) == ("The answer", "https://a.org/x")
    with pytest.raises(ToolError, match="no list"):
        read_results('{"error": "rate"}', "https://s.org/")
