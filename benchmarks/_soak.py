"""Many clients of one server process, some of whom leave in the middle; every answer is teacher-forced afterwards.

Clients ask over and over: greedily, or with a seed at temperature 1, in which case the reported log-probabilities are
compared. A client that leaves closes its connection, before the first token or after some. Wrong is an answer with a
token that is no near-tie of the likeliest (greedy), whose log-probability differs (seeded), that is longer than was
asked for, or that ended without its stream's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from _forced import NEAR_TIE, Reference
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import RunError
from shoal.protocol.chat import Message

NAME = "served"
START_S = 120.0
LEAVING = 0.5
"""Share of the clients' requests that are left early."""

SEEDED = 0.25
TOKENS = (8, 48)
"""Answers' limits, drawn between these."""

LOGPROB_TOLERANCE = 2e-3
EMPTY_S = 30.0
"""When everybody has gone, all places are free within this time."""


@dataclass(frozen=True)
class Answer:
    """What one client got."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    seeded: bool
    broken: str = ""
    """What was wrong with the stream itself."""


@contextlib.contextmanager
def server(local: LocalModel, threads: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`shoal serve` in fp32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shoal.cli", "serve", str(local.directory), "--name", NAME, "--dtype", "fp32"]
    command += ["--device", "cpu", "--port", str(port), "--threads", str(threads), "--context-tokens", "1024"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError("the server did not start.", "Try shoal serve by hand.")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def soak(local: LocalModel, texts: Sequence[str], *, streams: int, seconds: float, threads: int) -> dict[str, Any]:
    """Run it, and judge."""
    tokenizer = Tokenizer(local.directory)
    prompts = {text: tuple(tokenizer.prompt([Message("user", text)])) for text in texts}
    with server(local, threads) as (url, process):
        answers, seen = asyncio.run(_Crowd(url, process, prompts, streams, seconds).run())
    wrong, worst = judge(Reference(local.directory), answers)
    return seen | {
        "distinct": len({(answer.prompt, answer.ids) for answer in answers}),
        "tokens": sum(len(answer.ids) for answer in answers),
        "seeded": sum(answer.seeded for answer in answers),
        "wrong_answers": wrong,
        "worst_margin": worst,
    }


def judge(reference: Reference, answers: Sequence[Answer]) -> tuple[int, float]:
    """How many answers are wrong, and the largest margin of a greedy token."""
    judged = reference.judge([(answer.prompt, answer.ids) for answer in answers])
    wrong, worst = 0, 0.0
    reasons: Counter[str] = Counter()
    for answer, found in zip(answers, judged, strict=True):
        why = answer.broken
        if answer.seeded:
            off = [abs(a - b) for a, b in zip(answer.logprobs, found.logprobs, strict=False)]
            if max(off, default=0.0) > LOGPROB_TOLERANCE:
                why = why or f"a log-probability is off by {max(off):.4f}"
        else:
            worst = max(worst, found.worst)
            if found.worst >= NEAR_TIE:
                why = why or f"a token is {found.worst:.4f} behind the likeliest"
        if why:
            wrong += 1
            reasons[why] += 1
    for why, count in reasons.most_common(10):
        print(f"soak: {count} answers: {why}", file=sys.stderr, flush=True)
    return wrong, worst


class _Crowd:
    """The clients, and who watches the server."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[bytes],
        prompts: dict[str, tuple[int, ...]],
        streams: int,
        seconds: float,
    ) -> None:
        self._url, self._process, self._prompts = url, process, prompts
        self._streams, self._seconds = streams, seconds
        self._started = time.monotonic()
        self._answers: list[Answer] = []
        self._counts: Counter[str] = Counter()
        self._memory: list[float] = []
        self._live: list[float] = []

    async def run(self) -> tuple[list[Answer], dict[str, Any]]:
        limits = httpx.Limits(max_connections=self._streams + 4)
        async with httpx.AsyncClient(timeout=httpx.Timeout(300), limits=limits) as http:
            watcher = asyncio.create_task(self._watch(http))
            await asyncio.gather(*(self._client(http, number) for number in range(self._streams)))
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            inside = await self._until_empty(http)
        third = max(1, len(self._memory) // 3)
        before, after = self._memory[third : 2 * third] or self._memory, self._memory[-third:]
        return self._answers, {
            "seconds": time.monotonic() - self._started,
            "streams_finished": self._counts["finished"],
            "streams_left": self._counts["left"],
            "streams_refused": self._counts["refused"],
            "memory_mb": max(self._memory),
            "memory_growth_mb": max(after) - max(before),
            "most_live": max(self._live, default=0.0),
            "left_inside": inside,
        }

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        stream = random.Random(number)
        texts = list(self._prompts)
        while time.monotonic() < self._started + self._seconds:
            text = stream.choice(texts)
            # A few seeds and limits only, so that many answers are the same and need judging once.
            body: dict[str, Any] = {
                "model": NAME,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": stream.choice(range(TOKENS[0], TOKENS[1] + 1, 8)),
                "stream": True,
                "logprobs": True,
                "return_token_ids": True,
                "temperature": 0,
            }
            seeded = stream.random() < SEEDED
            if seeded:
                body |= {"temperature": 1, "seed": stream.randrange(2)}
            leave_after = stream.randrange(0, TOKENS[1] // 2) if stream.random() < LEAVING else None
            try:
                answer, ended = await self._ask(http, body, seeded, leave_after)
            except httpx.HTTPStatusError as error:
                self._counts["refused"] += 1
                if error.response.status_code != 429:
                    self._answers.append(Answer((), (), (), False, f"status {error.response.status_code}"))
                await asyncio.sleep(1)
                continue
            except httpx.TransportError as error:
                self._answers.append(Answer((), (), (), False, f"the stream broke: {type(error).__name__}"))
                continue
            self._counts["finished" if ended else "left"] += 1
            self._answers.append(answer)

    async def _ask(
        self, http: httpx.AsyncClient, body: dict[str, Any], seeded: bool, leave_after: int | None
    ) -> tuple[Answer, bool]:
        prompt = self._prompts[body["messages"][0]["content"]]
        ids: list[int] = []
        logprobs: list[float] = []
        broken, finish, ended = "", None, False
        async with http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            pieces = 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                    break
                if not line:
                    continue
                said = json.loads(line.removeprefix("data: "))
                if "choices" not in said:
                    broken = f"an error came: {said['error']['message']}"
                    break
                (choice,) = said["choices"]
                ids += choice.get("token_ids") or ()
                logprobs += [one["logprob"] for one in (choice["logprobs"] or {}).get("content") or ()]
                finish = choice["finish_reason"] or finish
                pieces += 1
                if leave_after is not None and pieces > leave_after:
                    break
        left = leave_after is not None and not ended
        if not left and not broken and (not ended or finish not in ("stop", "length")):
            broken = "a stream ended without its end"
        if len(ids) > body["max_tokens"] or (finish == "length" and len(ids) != body["max_tokens"]):
            broken = broken or f"{len(ids)} tokens for max_tokens = {body['max_tokens']}"
        return Answer(prompt, tuple(ids), tuple(logprobs), seeded, broken), ended

    async def _watch(self, http: httpx.AsyncClient) -> None:
        said = time.monotonic()
        while True:
            self._memory.append(resident_mb(self._process.pid))
            with contextlib.suppress(httpx.TransportError):
                self._live.append(await self._metric(http, "shoal_sequences_live"))
            if time.monotonic() > said + 30:
                said = time.monotonic()
                print(
                    f"soak: {said - self._started:.0f} s, {dict(self._counts)}, {self._memory[-1]:.0f} MB",
                    file=sys.stderr,
                    flush=True,
                )
            await asyncio.sleep(1)

    async def _until_empty(self, http: httpx.AsyncClient) -> float:
        """Completions that are still inside a while after everybody has gone."""
        deadline = time.monotonic() + EMPTY_S
        while True:
            names = ("shoal_completions_inside", "shoal_sequences_live", "shoal_sequences_waiting")
            inside = [await self._metric(http, name) for name in names]
            if not any(inside) or time.monotonic() > deadline:
                return max(inside)
            await asyncio.sleep(0.1)

    async def _metric(self, http: httpx.AsyncClient, name: str) -> float:
        page = (await http.get(f"{self._url}/metrics")).text
        return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} "))


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
