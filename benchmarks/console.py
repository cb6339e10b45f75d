"""How soon the console shows a long run, what its pages weigh, and the same of NiceGUI's smallest page.

    long      a run of a million events and 100,000 steps: until its first page, until all of it is read, memory
    pages     each view of a run: milliseconds to write it, bytes
    start     until the first page is there, bytes that a browser loads for it: the console beside NiceGUI

Beside NiceGUI the page is one of three numbers, a table and a chart; it lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from shoal.envs.web.browser import ARGUMENTS, BrowserError, require_browser
from shoal.serving.console.app import RENDERS
from shoal.serving.console.house import House, Watched
from shoal.serving.console.runs import RunFolder

from _common import benchmark, emit, peer_env

NUM_EVENTS, NUM_STEPS = 1_000_000, 100_000
REPEATS = 3
START_S = 60.0
NICEGUI = "nicegui==3.18.0"

PEER = """
import sys
from nicegui import ui

@ui.page("/")
def page():
    for value in (1, 2, 3):
        ui.card().classes("p-4")
        ui.label(str(value))
    ui.table(columns=[{"name": "a", "label": "a", "field": "a"}], rows=[{"a": 1}])
    ui.echart({"xAxis": {"type": "value"}, "yAxis": {"type": "value"}, "series": [{"type": "line", "data": [[0, 1]]}]})

ui.run(port=int(sys.argv[1]), show=False, reload=False, reconnect_timeout=3)
"""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parts: dict[str, Callable[[Path], tuple[list[Row], dict[str, float]]]] = {
        "long": long,
        "pages": pages,
        "start": start,
    }
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    rows: list[Row] = []
    headline: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        for name in parser.parse_args().only:
            print(f"{name} …", file=sys.stderr, flush=True)
            more, numbers = parts[name](Path(scratch))
            rows += more
            headline |= numbers
    emit(rows, headline)


def write_run(path: Path, num_events: int, num_steps: int) -> Path:
    """A run's folder of this length."""
    path.mkdir()
    (path / "config.toml").write_text(f"[run]\nsteps = {num_steps}\n")
    with (path / "events.jsonl").open("w") as file:
        for number in range(num_events):
            data = {"lease": f"l{number}", "worker": f"worker-{number % 100}"}
            line = {"time": 1e9 + number, "node": "aa" * 8, "kind": "lease.expired", "data": data}
            file.write(json.dumps(line) + "\n")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            line = {"time": 1e9 + step, "kind": "step", "step": step, "reward": step / num_steps, "train_s": 1.0}
            line |= {"wait_s": 0.1, "publish_s": 0.2, "mismatch_kl": 0.003, "entropy": 0.5, "grad_norm": 1.0}
            line |= {"staleness/1": 90, "staleness/2": 6, "staleness_mean": 1.1, "staleness_max": 2.0}
            file.write(json.dumps(line) + "\n")
    return path


def long(scratch: Path) -> tuple[list[Row], dict[str, float]]:
    path = write_run(scratch / "long", NUM_EVENTS, NUM_STEPS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    house = House([Watched("long", RunFolder(path))])
    _, is_behind = house.read_on()
    RENDERS["overview"](house, {})
    first_s = time.perf_counter() - started
    while is_behind:
        _, is_behind = house.read_on()
    RENDERS["run"](house, {})
    all_s = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    state = house.runs["long"].folder
    assert state is not None and state.state.kinds["lease.expired"] == NUM_EVENTS and state.state.step == NUM_STEPS
    row = {"part": "long", "first_page_s": first_s, "all_read_s": all_s, "memory_bytes": grown}
    return [row], {"long_first_page_s": first_s, "long_all_read_s": all_s, "long_memory_bytes": float(grown)}


def pages(scratch: Path) -> tuple[list[Row], dict[str, float]]:
    house = House([Watched("run", RunFolder(write_run(scratch / "run", 2000, 500)))])
    house.read_on()
    rows: list[Row] = []
    for view, render in RENDERS.items():
        taken = []
        for _ in range(20):
            started = time.perf_counter()
            html = render(house, {})
            taken.append(1000 * (time.perf_counter() - started))
        rows.append({"part": "pages", "view": view, "median_ms": median(taken), "bytes": len(html.encode())})
    return rows, {"slowest_page_ms": max(row["median_ms"] for row in rows)}


def start(scratch: Path) -> tuple[list[Row], dict[str, float]]:
    peer = peer_env("console-nicegui", [NICEGUI])
    script = scratch / "peer.py"
    script.write_text(PEER)
    run = write_run(scratch / "started", 100, 50)
    own = [sys.executable, "-m", "shoal.cli", "console", str(run)]
    made: dict[str, tuple[Callable[[int], list[str]], str]] = {
        "console": (lambda port: [*own, "--port", str(port)], "/console/overview"),
        "nicegui": (lambda port: [str(peer), str(script), str(port)], "/"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    loaded: dict[str, dict[str, float]] = {}
    for repeat in range(REPEATS + 1):
        for name, (command, path) in made.items():
            with serving(command, path) as (url, taken):
                if repeat:  # the first round fills caches of bytecode
                    seconds[name].append(taken)
                else:
                    loaded[name] = asyncio.run(load(url))
    rows = [
        {"part": "start", "page": name, "median_s": median(taken), **loaded[name]} for name, taken in seconds.items()
    ]
    packages = len(list(peer.parents[1].glob("lib/python*/site-packages/*.dist-info")))
    rows.append({"part": "start", "page": "nicegui's environment", "bytes": folder_bytes(peer), "packages": packages})
    return rows, {f"start_{name}_s": median(taken) for name, taken in seconds.items()}


@contextmanager
def serving(command: Callable[[int], list[str]], path: str) -> Iterator[tuple[str, float]]:
    """A server's page, once it answers, and the seconds until then."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started, url = time.perf_counter(), f"http://127.0.0.1:{port}{path}"
    process = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(verify=False, follow_redirects=True) as client:
            while True:
                try:
                    if client.get(url).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.01)
                assert time.perf_counter() - started < START_S and process.poll() is None, "it does not start"
        yield url, time.perf_counter() - started
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def load(url: str) -> dict[str, float]:
    """What a browser loads for a page, where this machine has one."""
    from playwright.async_api import Response, async_playwright

    try:
        program = require_browser()
    except BrowserError:
        return {}
    sizes: list[int] = []

    async def came(response: Response) -> None:
        if "event-stream" not in response.headers.get("content-type", ""):
            sizes.append(len(await response.body()))

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=str(program), args=[*ARGUMENTS, "--no-sandbox"])
        page = await browser.new_page()
        waits: list[asyncio.Task[None]] = []
        page.on("response", lambda response: waits.append(asyncio.ensure_future(came(response))))
        await page.goto(url, wait_until="load")
        await page.wait_for_timeout(2000)
        await asyncio.gather(*waits, return_exceptions=True)
        await browser.close()
    return {"bytes_loaded": float(sum(sizes)), "requests": float(len(sizes))}


def folder_bytes(python: Path) -> int:
    """The size of an environment's packages."""
    found = 0
    for folder, _, files in os.walk(python.parents[1] / "lib"):
        found += sum(os.lstat(os.path.join(folder, file)).st_size for file in files)
    return found


if __name__ == "__main__":
    benchmark(main)
