"""The pages over HTTP: who is let in, what may change anything, and what a browser may do with them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from console_cases import Page, make_run

from shoal.errors import NetworkError, StorageError
from shoal.serving.console import door as door_module
from shoal.serving.console.app import RENDERS, Console, make_app
from shoal.serving.console.door import COOKIE, LIFE_S, Door, kept_secret
from shoal.serving.console.hosting import hosted
from shoal.serving.console.hosting import listening as bound
from shoal.serving.console.house import House, Watched
from shoal.serving.console.runs import RunFolder
from shoal.serving.keys import Keys, digest

SECRET = bytes(32)
KEY = "sk-shoal-test"
KEYED = Keys({digest(KEY): "alice"})


@asynccontextmanager
async def visiting(
    folder: Path, keys: Keys = KEYED, host: str = "console.test", door: Door | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A browser without a script, before a console of one run."""
    path = folder / "run"
    house = House([Watched("run", RunFolder(path if path.exists() else make_run(path)))])
    app = make_app(Console(house, door or Door(keys, SECRET)))
    transport = httpx.ASGITransport(app)
    async with house.looking(), httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        yield client


async def log_in(client: httpx.AsyncClient, key: str = KEY) -> httpx.Response:
    return await client.post("/console/login", data={"key": key})


def token_of(html: str) -> str:
    found = re.search(r'data-token="([0-9a-f]+)"', html)
    assert found is not None
    return found[1]


async def test_without_a_session_nothing_is_learnt(tmp_path: Path) -> None:
    async with visiting(tmp_path) as client:
        for path in (*(f"/console/{view}" for view in RENDERS), "/console/run?run=x"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, "/console/login"), path
        for path in ("/console/live", "/console/part/run", "/console/nothing"):
            assert (await client.get(path)).status_code == 401, path
        for path in ("/console/say", "/console/logout"):
            assert (await client.post(path)).status_code == 401, path
        client.cookies.set(COOKIE, f"{'a' * 64}.{int(time.time())}.{'b' * 16}.{'c' * 64}")
        assert (await client.get("/console/part/run")).status_code == 401


async def test_a_key_opens_and_logging_out_closes(tmp_path: Path) -> None:
    async with visiting(tmp_path) as client:
        wrong = await log_in(client, "sk-shoal-wrong")
        assert wrong.status_code == 401
        assert "not known" in wrong.text
        right = await log_in(client)
        assert right.status_code == 303
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Path=/console" in cookie
        assert KEY not in cookie
        page = await client.get("/console/run")
        assert "Log out" in page.text
        assert not Page(page.text).wrong
        assert (await client.post("/console/logout")).status_code == 403
        out = await client.post("/console/logout", headers={"X-CSRF-Token": token_of(page.text)})
        assert out.status_code == 200
        assert (await client.get("/console/part/run")).status_code == 401


async def test_a_session_outlives_a_restart_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with visiting(tmp_path) as client:
        await log_in(client)
        cookie = client.cookies[COOKIE]
    async with visiting(tmp_path) as client:
        client.cookies.set(COOKIE, cookie, domain="console.test", path="/console")
        assert (await client.get("/console/part/run")).status_code == 200
        monkeypatch.setattr("shoal.serving.console.app.now", lambda: time.time() + LIFE_S + 1)
        assert (await client.get("/console/part/run")).status_code == 401
    monkeypatch.undo()
    # The key was taken out of the file.
    async with visiting(tmp_path, Keys({digest("another"): "bob"})) as client:
        client.cookies.set(COOKIE, cookie, domain="console.test", path="/console")
        assert (await client.get("/console/part/run")).status_code == 401
    # Somebody else's server.
    async with visiting(tmp_path, door=Door(KEYED, bytes([1]) * 32)) as client:
        client.cookies.set(COOKIE, cookie, domain="console.test", path="/console")
        assert (await client.get("/console/part/run")).status_code == 401


async def test_changes_need_the_pages_own_token(tmp_path: Path) -> None:
    async with visiting(tmp_path) as client:
        await log_in(client)
        token = token_of((await client.get("/console/run")).text)
        body = {"voice": "x@1", "messages": [{"role": "user", "content": "hi"}]}
        refused = [
            await client.post("/console/say", json=body),
            await client.post("/console/say", json=body, headers={"X-CSRF-Token": "0" * 64}),
            await client.post("/console/say", json=body, headers={"X-CSRF-Token": token, "Origin": "http://evil.test"}),
            await client.post("/console/say", json=body, headers={"X-CSRF-Token": token, "Origin": "null"}),
        ]
        assert [answer.status_code for answer in refused] == [403] * 4
        said = await client.post("/console/say", json=body, headers={"X-CSRF-Token": token})
        assert said.status_code == 200
        assert "there is no model" in said.text
        for wrong in ({}, {**body, "extra": 1}, {**body, "messages": "x"}):
            answer = await client.post("/console/say", json=wrong, headers={"X-CSRF-Token": token})
            assert answer.status_code == 400
        huge = await client.post("/console/say", content=b"x" * 300_000, headers={"X-CSRF-Token": token})
        assert huge.status_code == 400
        evil = await client.post("/console/login", data={"key": KEY}, headers={"Origin": "http://evil.test"})
        assert evil.status_code == 403


async def test_without_keys_only_this_machine_is_answered(tmp_path: Path) -> None:
    async with visiting(tmp_path, Keys({}), "127.0.0.1:8900") as client:
        page = await client.get("/console/run")
        assert page.status_code == 200
        assert COOKIE in page.headers["set-cookie"]
        assert "Log out" not in page.text
        token = token_of((await client.get("/console/run")).text)
        assert (await client.post("/console/logout", headers={"X-CSRF-Token": token})).status_code == 200
        assert (await client.get("/console/login")).status_code == 303
    for name, status in (("localhost:1", 200), ("[::1]:9", 200), ("evil.test", 421), ("127.0.0.1.evil.test", 421)):
        async with visiting(tmp_path, Keys({}), name) as client:
            assert (await client.get("/console/run")).status_code == status, name


async def test_pages_let_a_browser_do_nothing_else(tmp_path: Path) -> None:
    async with visiting(tmp_path, Keys({}), "localhost") as client:
        answers = [await client.get("/console/run") for _ in range(2)]
        policies = [answer.headers["content-security-policy"] for answer in answers]
        nonces = [re.search(r"'nonce-([^']+)'", policy) for policy in policies]
        assert nonces[0] is not None and nonces[1] is not None
        assert nonces[0][1] != nonces[1][1]
        assert f'nonce="{nonces[0][1]}"' in answers[0].text
        for policy in policies:
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
        assert answers[0].headers["x-content-type-options"] == "nosniff"
        assert answers[0].headers["cache-control"] == "no-store"
        for link in {one for one in Page(answers[0].text).links if "/asset/" in one}:
            asset = await client.get(link)
            assert asset.status_code == 200
            assert "immutable" in asset.headers["cache-control"]
        assert (await client.get("/console/asset/../app.py")).status_code in (404, 401, 303)
        assert (await client.get("/console/asset/app.py")).status_code == 404


async def test_parts_and_unknown_views(tmp_path: Path) -> None:
    async with visiting(tmp_path, Keys({}), "localhost") as client:
        assert (await client.get("/console/nothing")).status_code == 404
        assert (await client.get("/console/part/nothing")).status_code == 404
        for view in RENDERS:
            part = await client.get(f"/console/part/{view}", params={"q": "x" * 5000, "step": "9" * 400, "run": "no"})
            assert part.status_code == 200
            assert "<html" not in part.text
        home = await client.get("/")
        assert home.headers["location"] == "/console/overview"


async def test_a_server_ends_though_a_page_is_open(tmp_path: Path) -> None:
    house = House([Watched("run", RunFolder(make_run(tmp_path / "run")))])
    async with (
        httpx.AsyncClient(timeout=30.0) as client,
        hosted(house, Door(Keys({}), SECRET), bound("127.0.0.1", 0)) as url,
    ):
        assert (await client.get(f"{url}/run")).status_code == 200
        async with client.stream("GET", f"{url}/live") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.aiter_lines()
            while not (line := await anext(lines)).startswith("data"):
                pass
            assert '"overview"' in line
            ending = asyncio.create_task(_read_on(lines))
            house.live.close()
            await ending
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/run")


async def _read_on(lines: AsyncIterator[str]) -> None:
    async for _ in lines:
        pass


def test_a_port_that_is_taken_is_said() -> None:
    with bound("127.0.0.1", 0) as taken, pytest.raises(NetworkError, match="cannot be used"):
        bound("127.0.0.1", taken.getsockname()[1])


def test_the_secret_is_kept_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "console" / "secret"
    made = kept_secret(path)
    assert len(made) == door_module.SECRET_BYTES
    assert kept_secret(path) == made
    path.chmod(0o644)
    with pytest.raises(StorageError):
        kept_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        kept_secret(path)
