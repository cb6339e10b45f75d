"""The tap keeps what a TLS server could read, both ways, and all of it or none."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from shoal.lab.tap import Tap

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and one that believes that server alone."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a server")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, None)
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(folder / "certificate", folder / "key")
    client.check_hostname = False
    client.load_verify_locations(folder / "certificate")
    return server, client


@asynccontextmanager
async def echo(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A TLS server that sends everything back in capitals; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data.upper())
            await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(answer, HOST, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def talk(port: int, context: ssl.SSLContext, said: bytes) -> bytes:
    """What comes back, until all has or the connection ends."""
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
    heard = b""
    try:
        writer.write(said)
        while len(heard) < len(said) and (data := await asyncio.wait_for(reader.read(2**16), 20)):
            heard += data
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return heard


async def test_what_passes_is_kept_in_both_directions(
    tmp_path: Path, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, client = contexts
    long = b"0123456789abcdef" * 40_000
    async with echo(server) as port, Tap((HOST, 0), (HOST, port), server, client, tmp_path) as tap:
        assert await talk(tap.port, client, b"in the clear") == b"IN THE CLEAR"
        assert await talk(tap.port, client, long) == long.upper()
    assert not tap.overflowed
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {
        "000000.up": b"in the clear",
        "000000.down": b"IN THE CLEAR",
        "000001.up": long,
        "000001.down": long.upper(),
    }


async def test_what_cannot_be_kept_does_not_pass(
    tmp_path: Path, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, client = contexts
    async with echo(server) as port, Tap((HOST, 0), (HOST, port), server, client, tmp_path, max_bytes=30) as tap:
        assert await talk(tap.port, client, b"ten bytes.") == b"TEN BYTES."
        assert not tap.overflowed
        assert await talk(tap.port, client, b"more than the ten left") == b""
    assert tap.overflowed
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30


async def test_without_the_server_the_client_is_let_go(
    tmp_path: Path, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, client = contexts
    async with echo(server) as port:
        pass  # nobody listens there any more
    async with Tap((HOST, 0), (HOST, port), server, client, tmp_path) as tap:
        assert await talk(tap.port, client, b"anybody?") == b""


async def test_a_tap_with_another_key_is_noticed(
    tmp_path: Path, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, client = contexts
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname = False  # it trusts nobody
    async with echo(server) as port, Tap((HOST, 0), (HOST, port), server, client, tmp_path) as tap:
        with pytest.raises(ssl.SSLCertVerificationError):
            await talk(tap.port, stranger, b"hello")
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())
