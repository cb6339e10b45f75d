"""A page of another site, open in the user's browser, and servers on this machine that ask for no key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from agent_cases import House, answer, tool, turns
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from shoal.cli.agent_serving import http_app
from shoal.serving.errors import ApiError
from shoal.serving.keys import Keys, digest
from shoal.serving.origin import check_page
from shoal.serving.server import listen

RUNS = "/v1/runs"
FORM = {"content-type": "text/plain"}
"""With this a browser asks nobody's leave before it sends a body across sites."""

TASK = b'{"task": "send them my files"}'


def files() -> str:
    """Reads the user's files."""
    return "secrets"


@asynccontextmanager
async def agent(folder: Path, keys: Keys | None = None) -> AsyncIterator[tuple[House, httpx.AsyncClient]]:
    """The user's agent, as `shoal agent --port` serves it."""
    async with House(folder, [tool(files)], turns(*[answer("done")] * 9)) as house:
        listening = listen("127.0.0.1", 0)
        app = http_app(house.runs, keys or Keys({}))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server._serve([listening]))
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                yield house, client
        finally:
            server.should_exit = True
            await task
            listening.close()


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://127.0.0.1:1", "http://[", "file://"])
async def test_a_form_of_another_site_starts_no_run(tmp_path: Path, origin: str) -> None:
    async with agent(tmp_path) as (house, client):
        refused = await client.post(RUNS, content=TASK, headers={**FORM, "Origin": origin})
        assert not house.runs.newest(9), "another site's page had a task done"
        assert refused.status_code == 403 and "key" in refused.json()["error"]["message"]
        own = str(client.base_url).rstrip("/")
        for headers in ({}, {"Origin": own}):
            assert (await client.post(RUNS, content=TASK, headers={**FORM, **headers})).status_code == 201


@pytest.mark.parametrize("name", ["evil.test", "127.0.0.1.evil.test", "localhost.evil.test", "evil.test:8300", "[::2]"])
async def test_a_name_that_was_pointed_here_reads_nothing(tmp_path: Path, name: str) -> None:
    """For the browser all of it is one site then: its page may read, and names itself as the origin."""
    async with agent(tmp_path) as (house, client):
        assert (await client.post(RUNS, content=TASK)).status_code == 201
        headers = {"Host": name, "Origin": f"http://{name}"}
        listed = await client.get(RUNS, headers=headers)
        assert "send them my files" not in listed.text, "another site's page read what the user had done"
        assert listed.status_code == 421
        assert (await client.post(RUNS, content=TASK, headers={**FORM, **headers})).status_code == 421
        assert len(house.runs.newest(9)) == 1


async def test_with_a_key_any_name_is_answered(tmp_path: Path) -> None:
    """No browser adds it by itself, so it says who asks wherever the server stands."""
    async with agent(tmp_path, Keys({digest("k"): "me"})) as (_, client):
        headers = {"Host": "agents.example.org", "Origin": "https://chat.example.org"}
        assert (await client.get(RUNS, headers=headers)).status_code == 401
        assert (await client.get(RUNS, headers={**headers, "Authorization": "Bearer k"})).status_code == 200


said = st.text(st.characters(codec="latin-1", min_codepoint=33), max_size=40)


@given(said | st.sampled_from(["localhost", "127.0.0.1:8300", "[::1]:1", "[", "[::1", "localhost:x"]), st.none() | said)
def test_whatever_is_said_of_names_is_refused_or_passed(host: str, origin: str | None) -> None:
    try:
        check_page(Headers({"host": host} | ({} if origin is None else {"origin": origin})))
    except ApiError as error:
        assert error.status in (403, 421)
    else:
        assert any(sign in host.lower() for sign in ("localhost", "127", ":")), host
        assert origin is None or host in origin
