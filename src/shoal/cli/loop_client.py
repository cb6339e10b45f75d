"""A client of the loop's server: it asks all the time, so that it shows whether serving goes on while versions come.

Invariants: what does not answer is counted and never ends the loop; what went wrong before the first answer is not
counted, because the server is still loading then.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import httpx

from shoal.agents.collective.problems import problem
from shoal.cli.loop_state import LoopFolder
from shoal.envs.base import stable_int

REQUESTS = "requests.jsonl"
MODEL = "policy"
"""What `shoal serve --follow` calls a run's model."""

MAX_TOKENS = 24
TIMEOUT_S = 120.0
RANGE = 10**15


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask_for_ever(folder: LoopFolder, port: int, seed: int, every_s: float) -> None:
    """Send a request, note what came of it, wait, again, until cancelled."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    has_answered, number = False, 0
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        while True:
            text = problem("train", stable_int("client", seed, number) % RANGE).text
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS}
            began = time.monotonic()
            found: dict[str, Any]
            try:
                answer = await client.post(url, json=body)
                found = {"status": answer.status_code}
                if answer.status_code == httpx.codes.OK:
                    has_answered = True
                    found["version"] = int(answer.json()["system_fingerprint"].removeprefix("v"))
            except httpx.HTTPError as error:
                found = {"status": 0, "reason": f"{type(error).__name__}: {error}"[:200]}
            if has_answered:
                folder.add(REQUESTS, seconds=round(time.monotonic() - began, 4), at=time.time(), **found)
                number += 1
            await asyncio.sleep(every_s)
