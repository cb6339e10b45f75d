"""What a page may reach: our sites, hosts that are allowed, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from shoal.envs.web.gate import Allowed, Gate, Request, Response, opened


async def ask(gate: Gate, request: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(request.replace("\n", "\r\n").encode())
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer.decode()


def echo(request: Request) -> Response:
    return Response(f"{request.method} {request.path} {request.query} {request.body.decode()}".encode())


async def test_sites_of_ours_are_answered_here() -> None:
    async with opened({"a.test": echo}, Allowed()) as gate:
        answer = await ask(gate, "POST http://a.test/x?y=1 HTTP/1.1\nHost: a.test\nContent-Length: 2\n\nhi")
    assert answer.startswith("HTTP/1.1 200") and answer.endswith("POST /x y=1 hi")


@pytest.mark.parametrize(
    "request_line",
    ["GET http://b.test/ HTTP/1.1\nHost: b.test\n\n", "CONNECT b.test:443 HTTP/1.1\nHost: b.test:443\n\n"],
)
async def test_other_hosts_are_refused_and_named(request_line: str) -> None:
    async with opened({"a.test": echo}, Allowed(("c.test",))) as gate:
        assert (await ask(gate, request_line)).startswith("HTTP/1.1 403")
        assert gate.refused == ["b.test"]


async def test_an_allowed_server_is_reached_only_if_its_port_is_named() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.readuntil(b"\r\n\r\n")
        body = said.partition(b"\r\n")[0]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with opened({}, Allowed((f"localhost:{port}",))) as gate:
            answer = await ask(gate, f"GET http://localhost:{port}/deep HTTP/1.1\nHost: localhost\n\n")
            assert answer.endswith("GET /deep HTTP/1.1")
            tunnel = await ask(gate, f"CONNECT localhost:{port} HTTP/1.1\nHost: x\n\nGET /through HTTP/1.1\n\n")
            assert "GET /through HTTP/1.1" in tunnel
            assert (await ask(gate, f"GET http://127.0.0.1:{port}/ HTTP/1.1\nHost: x\n\n")).startswith("HTTP/1.1 403")
    finally:
        server.close()


async def test_a_name_that_leads_to_this_machine_is_not_connected_to() -> None:
    async with opened({}, Allowed(("localhost",))) as gate:
        assert await ask(gate, "GET http://localhost/ HTTP/1.1\nHost: localhost\n\n") == ""


@pytest.mark.parametrize(
    ("entry", "host", "port", "covered"),
    [
        ("example.org", "example.org", 443, True),
        ("example.org", "example.org", 8080, False),
        ("example.org", "www.example.org", 443, False),
        ("*.example.org", "www.example.org", 80, True),
        ("*.example.org", "example.org", 80, False),
        ("*.example.org", "badexample.org", 80, False),
        ("localhost:8023", "localhost", 8023, True),
        ("localhost:8023", "localhost", 80, False),
    ],
)
def test_what_an_entry_covers(entry: str, host: str, port: int, covered: bool) -> None:
    assert Allowed((entry,)).names(host, port) is covered


async def test_a_body_that_is_too_long_ends_the_connection() -> None:
    async with opened({"a.test": echo}, Allowed()) as gate:
        head = "POST http://a.test/ HTTP/1.1\nHost: a.test\nContent-Length: 9999999\n\n"
        _, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(head.replace("\n", "\r\n").encode())

        async def flood() -> None:
            for _ in range(200):
                writer.write(b"x" * 65536)
                await writer.drain()

        with pytest.raises(ConnectionError):
            await flood()
        writer.close()
