"""Sandboxes for the tests, or the reason why there are none; and eyes on what they leave behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_processes import alive, descendants

from shoal.sandbox import Availability, Sandbox


@pytest.fixture(scope="session")
def availability() -> Availability:
    return asyncio.run(Sandbox.available())


@pytest.fixture
def sandbox(availability: Availability) -> Sandbox:
    """Runs programs, where this machine can."""
    if not availability.python:
        pytest.skip("; ".join(f"{lack.what} {lack.remedy}" for lack in availability.missing))
    return Sandbox()


@pytest.fixture
def deno(sandbox: Sandbox, availability: Availability) -> Sandbox:
    """The same where Deno is there too."""
    if not availability.deno:
        pytest.skip("; ".join(f"{lack.what} {lack.remedy}" for lack in availability.missing))
    return sandbox


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a process behind."""
    before = descendants(os.getpid())
    yield
    deadline = time.monotonic() + 10
    while (left := alive(descendants(os.getpid()) - before)) and time.monotonic() < deadline:
        time.sleep(0.02)  # A killed process is a moment in dying.
    assert not left, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}
