"""A server that follows a run: versions come while answers are drawn, and trouble with the run is not the clients'."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from runs import Runs, until

pytest_plugins = ["runs"]
pytestmark = pytest.mark.timeout(300)

HTTP = httpx.Client(timeout=30.0)


def answer(url: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "policy", "messages": [{"role": "user", "content": "1"}], "max_tokens": 4, **changes}
    got = HTTP.post(f"{url}/chat/completions", json=body)
    assert got.status_code == 200, got.text
    return dict(got.json())


def version(url: str) -> int:
    return int(answer(url)["system_fingerprint"].removeprefix("v"))


@pytest.mark.slow
@pytest.mark.parametrize("over", [(), ("--stages", "2")], ids=["alone", "stages"])
def test_versions_are_served_while_they_are_trained_and_after_the_run(runs: Runs, over: tuple[str, ...]) -> None:
    train = runs.train("--workers", "1", envs__digit__type="tiny:Slow", run__steps=500)
    run = runs.run
    until(lambda: len(run.steps) >= 1, train, run)
    server = runs.shoal("serve", run.path, "--follow", "--port", "0", "--context-tokens", "128", "--json", *over)
    until(lambda: server.out.read_text().endswith("\n"), server)
    url = str(server.result["url"])
    first = version(url)
    assert first >= 0
    reached: Callable[[], bool] = lambda: version(url) >= first + 2  # noqa: E731
    until(reached, train, run)
    train.send(signal.SIGTERM)
    train.wait()
    kept = version(url)
    deadline = time.monotonic() + 30
    while "no newer version" not in server.said and time.monotonic() < deadline:
        assert version(url) >= kept
        time.sleep(0.5)
    assert "no newer version" in server.said
    server.send(signal.SIGTERM)
    assert server.wait() == 0, server.said
    assert "Traceback" not in server.said
    assert not list((runs.home / "snapshots").glob("*-served-*"))
