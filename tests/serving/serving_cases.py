"""Servers as users start them, and what tests ask them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from runs import PATIENCE_S, Process

MODEL = "tiny"

HTTP = httpx.Client(verify=False, timeout=PATIENCE_S)  # nothing here is encrypted, and certificates take time to load


@dataclass
class ChatServer:
    """One running `shoal serve`."""

    process: Process
    url: str
    port: int
    key: str = "none"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=PATIENCE_S)

    @property
    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=PATIENCE_S)

    def post(self, path: str, body: Any) -> httpx.Response:
        return HTTP.post(f"{self.url}{path}", json=body, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def metric(self, name: str) -> float:
        """A number of the metrics page, summed over its labels."""
        page = HTTP.get(f"http://127.0.0.1:{self.port}/metrics", headers=self.headers).text
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples if s.name == name]
        assert samples, f"{name} is not on the page:\n{page}"
        return sum(sample.value for sample in samples)

    def until_idle(self) -> None:
        """Wait until nobody is inside."""
        names = ("completions_inside", "sequences_live", "sequences_filling", "sequences_waiting")
        deadline = time.monotonic() + PATIENCE_S
        while any(self.metric(f"shoal_{name}") for name in names):
            assert time.monotonic() < deadline, "completions stay inside"
            time.sleep(0.05)


@contextmanager
def start(model: Path, folder: Path, *arguments: str, key: str = "none", **env: str) -> Iterator[ChatServer]:
    """A server of `model` that listens."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    command = ["serve", str(model), "--name", MODEL, "--port", "0", "--dtype", "fp32", "--device", "cpu", "--json"]
    process = Process([*command, *arguments], home, folder, **env)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (said := process.out.read_text()).endswith("\n"):
            if process.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{said}{process.said}")
            time.sleep(0.05)
        told = json.loads(said)
        yield ChatServer(process, told["url"], told["port"], key)
    finally:
        process.end()
