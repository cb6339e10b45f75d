"""An OpenEnv server of openenv's own package: a process in that package's environment, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

PATIENCE_S = 120.0
"""openenv takes long to import on a busy machine."""


@contextmanager
def started(python: str, program: Path) -> Iterator[str]:
    """The address of `program`, which takes its port as an argument, once it answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    said = program.with_suffix(".log")
    # Whose packages a server has is its own environment's business.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with said.open("wb") as log:
        server = subprocess.Popen([python, program, str(port)], stdout=log, stderr=log, env=environment)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", said)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(20)


def _wait(server: subprocess.Popen[bytes], url: str, said: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        assert server.poll() is None, said.read_text()
        try:
            if httpx.get(url, timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"no answer from {url}: {said.read_text()}")
