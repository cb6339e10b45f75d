"""Clients of a server that is struck by faults: short questions, and what came of each.

    python _chaos_client.py URL MODEL FILE DEADLINE_S

Half of the requests are streamed. Each is one line of FILE (a `_chaos_checks.Request`), written when it has ended. On
SIGTERM the clients ask nothing more, wait for what is under way, and end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from _chaos_checks import Request
from shoal.coordinator.processes import die_with_parent

CLIENTS = 2
PAUSE_S = 0.3
"""Between an answer and the next question."""

MAX_TOKENS = 8
EXTRA_S = 5.0
"""A client waits this much longer than a server may take, so that a late answer is seen as late."""


class Crowd:
    """All clients, and their log."""

    def __init__(self, url: str, model: str, log: Path, deadline_s: float) -> None:
        self._url, self._model, self._deadline_s = url, model, deadline_s
        self._log = log.open("ab", buffering=0)
        self._ending = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._ask_on(number))
        self._log.close()

    async def _ask_on(self, number: int) -> None:
        asked = 0
        while not self._ending.is_set():
            asked += 1
            # A connection of its own each time: what a killed server leaves of kept ones is not what is looked at.
            timeout = httpx.Timeout(self._deadline_s + EXTRA_S)
            async with httpx.AsyncClient(timeout=timeout) as http:
                request = await self._ask(http, f"{number}+{asked % 5}=?", streamed=asked % 2 == 0)
            self._log.write(msgspec.json.encode(request) + b"\n")
            pause_s = PAUSE_S * (3 if request.outcome != "answered" else 1)
            try:
                await asyncio.wait_for(self._ending.wait(), pause_s)
            except TimeoutError:
                continue

    async def _ask(self, http: httpx.AsyncClient, text: str, *, streamed: bool) -> Request:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": MAX_TOKENS,
            "stream": streamed,
        }
        begun_s = time.monotonic()
        status, version, detail = 0, -1, ""
        try:
            async with asyncio.timeout(self._deadline_s + EXTRA_S):
                response = await http.post(f"{self._url}/chat/completions", json=body)
            status = response.status_code
            if status != 200:
                outcome, detail = "refused", response.text[:300]
            else:
                outcome, version = read(response.text, streamed=streamed)
        except httpx.ConnectError as error:
            outcome, detail = "unreachable", str(error)
        except (httpx.TimeoutException, TimeoutError) as error:
            outcome, detail = "unanswered", type(error).__name__
        except httpx.TransportError as error:
            outcome, detail = "broken", f"{type(error).__name__}: {error}"
        return Request(begun_s, time.monotonic(), outcome, status, version, detail)


def read(text: str, *, streamed: bool) -> tuple[str, int]:
    """Whether an answer is whole, and the newest version that it names."""
    if not streamed:
        said = json.loads(text)
        whole = said["choices"][0]["finish_reason"] in ("stop", "length")
        return ("answered" if whole else "broken"), version_of(said)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        return "broken", -1
    chunks = [json.loads(line) for line in lines[:-1]]
    if any("error" in chunk for chunk in chunks):
        return "broken", -1
    return "answered", max(version_of(chunk) for chunk in chunks)


def version_of(said: dict[str, Any]) -> int:
    """`v12` or `v12-rule`."""
    return int(str(said["system_fingerprint"]).removeprefix("v").partition("-")[0])


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(Crowd(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])).run())
