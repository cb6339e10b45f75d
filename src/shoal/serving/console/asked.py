"""What is asked of others while somebody looks: a coordinator's `RunStatus`, a server's metrics and models.

Invariants: nothing is waited for longer than its deadline; what comes back is bounded and typed before it is kept; a
coordinator or server that does not answer is said to, with what it said before beside it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from shoal.errors import NetworkError, RecordError, ShoalError
from shoal.protocol.status import RunStatus
from shoal.serving.console.series import Series

Ask = Callable[[], Awaitable[RunStatus]]
"""Asks a run's coordinator; raises `ShoalError` where it does not answer."""

Reach = Callable[[], AbstractAsyncContextManager[Ask]]
"""Connects to a run's coordinator; raises `ShoalError` where it can't be reached, or nobody runs the run."""

ASK_S = 2.0
"""Between two questions."""

SERVER_DEADLINE_S = 5.0
MAX_PAGE_BYTES = 2 * 2**20
MAX_MODELS = 256
MAX_COUNTERS = 512

SERVED = {
    "shoal_tokens_drawn": "tokens_per_s",
    "shoal_prompt_tokens": "prompt_tokens_per_s",
}
"""Counters whose rates become curves."""

GAUGED = {
    "shoal_sequences_live": "live",
    "shoal_sequences_waiting": "waiting",
}
"""Gauges that become curves."""


@dataclass
class Coordinator:
    """A run's coordinator, asked again and again."""

    reach: Reach
    status: RunStatus | None = None
    """What it said last."""
    heard_at: float = -math.inf
    """Monotonic seconds."""
    problem: str = ""
    """Why it says nothing at the moment; empty while it answers."""

    async def follow(self, is_wanted: Callable[[], bool], tell: Callable[[], None]) -> None:
        """Ask while it is wanted, until cancelled; `tell` is called when there is something new.

        One task connects, asks and closes: a connection's own tasks end where they began.
        """
        while True:
            if is_wanted():
                try:
                    async with self.reach() as ask:
                        await self._ask(ask, is_wanted, tell)
                except ShoalError as error:
                    if self.problem != error.problem:
                        self.problem = error.problem
                        tell()
            await asyncio.sleep(ASK_S)

    async def _ask(self, ask: Ask, is_wanted: Callable[[], bool], tell: Callable[[], None]) -> None:
        while True:
            if is_wanted():
                self.status = await ask()
                self.heard_at, self.problem = time.monotonic(), ""
                tell()
            await asyncio.sleep(ASK_S)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass
class Server:
    """A server of ours, reached over HTTP as any client reaches it.

    Args:
        url: up to and without `/v1`.
        key: an API key, or empty.
    """

    url: str
    key: str = ""
    models: tuple[str, ...] = ()
    counters: dict[str, float] = field(default_factory=dict)
    """Samples without labels, by name."""
    curves: dict[str, Series] = field(default_factory=dict)
    """Over seconds since it was first looked at."""
    problem: str = ""
    _since: float = math.nan
    _before: tuple[float, dict[str, float]] | None = None

    async def look(self) -> bool:
        """Ask once; whether anything is new."""
        before = self.models, self.counters, self.problem
        try:
            async with client_of(self.url, self.key, httpx.Timeout(SERVER_DEADLINE_S)) as client:
                models = await fetched(client, f"{self.url}/v1/models")
                page = await fetched(client, f"{self.url}/metrics")
            self.models = tuple(m.id[:256] for m in msgspec.json.decode(models, type=_Models).data[:MAX_MODELS])
            self._take(samples(page), time.monotonic())
            self.problem = ""
        except (NetworkError, RecordError) as error:
            self.problem = error.problem
        except msgspec.DecodeError:
            self.problem = f"what answers at {self.url} is no server of Shoal's."
        return before != (self.models, self.counters, self.problem)

    def _take(self, found: dict[str, float], now: float) -> None:
        self._since = now if math.isnan(self._since) else self._since
        x = now - self._since
        if self._before is not None and now > self._before[0]:
            then, old = self._before
            for name, curve in SERVED.items():
                rate = (found.get(f"{name}_total", 0.0) - old.get(f"{name}_total", 0.0)) / (now - then)
                self.curves.setdefault(curve, Series()).add(x, max(0.0, rate))
        for name, curve in GAUGED.items():
            self.curves.setdefault(curve, Series()).add(x, found.get(name, 0.0))
        self._before, self.counters = (now, found), found


def client_of(url: str, key: str, timeout: httpx.Timeout) -> httpx.AsyncClient:
    """A client of one server; certificates, which take time to load, are loaded where they are needed."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(verify=url.startswith("https:"), timeout=timeout, headers=headers, trust_env=False)


async def fetched(client: httpx.AsyncClient, url: str) -> bytes:
    """The body at an address, of bounded size.

    Raises:
        NetworkError: there is no answer, or a refusal.
    """
    try:
        async with client.stream("GET", url) as response:
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_PAGE_BYTES:
                    raise NetworkError(f"{url} answers more than {MAX_PAGE_BYTES} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NetworkError(f"{url} does not answer: {str(error) or type(error).__name__}.") from None
    if response.status_code == 401:
        raise NetworkError("the server asks for an API key.", "Give one by --key.")
    if response.status_code != 200:
        raise NetworkError(f"{url} answers {response.status_code}.")
    return bytes(body)


def samples(page: bytes) -> dict[str, float]:
    """The samples without labels on a page of metrics, by name.

    Raises:
        RecordError: it is no such page.
    """
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(page.decode("utf-8", "replace")):
            for sample in family.samples:
                if not sample.labels and math.isfinite(sample.value) and len(found) < MAX_COUNTERS:
                    found[sample.name] = sample.value
    except (ValueError, IndexError, KeyError) as error:
        raise RecordError(f"a page of metrics cannot be read: {error}.") from None
    return found
