"""Faults are the real thing: a probe feels each of them, and that it is over."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from _chaos_faults import clocks, set_clock
from _chaos_script import Fault, Script
from shoal.coordinator.processes import child_of_this
from shoal.lab import tun
from shoal.lab.network import Network, Node
from shoal.lab.packet import PacketLab, own_environment, packet_lab

PROBE = Path(__file__).with_name("fault_probe.py")
INSIDE = Path(__file__).parents[2] / "benchmarks" / "_chaos_inside.py"

PACKETS = 1000

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(tun.missing()), reason=tun.missing() or "the packet lab works here"),
]


def environment() -> dict[str, str]:
    found = own_environment() | child_of_this()
    return found | {"PYTHONPATH": os.pathsep.join([str(INSIDE.parent), found["PYTHONPATH"]])}


def test_a_disk_is_full_read_only_and_slow_and_then_sound_again(tmp_path: Path) -> None:
    command = [sys.executable, str(PROBE), "disk", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    full, read_only = "No-space-left-on-device", "Read-only-file-system"
    assert found["whole"] == found["emptied"] == found["uncovered"] == "ok"
    assert found["full"].split()[0] in (full, "cut", "ok") and found["full"].split()[1] in (full, "cut")
    assert found["read-only"] == f"{read_only} {read_only} 4"
    assert found.get("slow", "True") == "True"
    assert found["closed"] == "[] ['disk']"


def test_a_clock_jumps_while_its_process_runs_and_the_monotonic_one_does_not(tmp_path: Path) -> None:
    script = Script(0, 20.0, (Fault("clock_jump", ("server",), 1.0, 2.0, 3600.0),))
    (preload,) = asyncio.run(clocks(script, tmp_path)).values()
    program = "import time\nwhile input(): print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | preload,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def off_s() -> tuple[float, float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("now\n")
            process.stdin.flush()
            told, monotonic = map(float, process.stdout.readline().split())
            return told - time.time(), monotonic - time.monotonic()

        for offset_s in (0.0, 3600.0, -30.0, 0.0):
            set_clock(tmp_path, "server", offset_s)
            clock_s, monotonic_s = off_s()
            assert clock_s == pytest.approx(offset_s, abs=5) and monotonic_s == pytest.approx(0, abs=5)
        process.communicate("\n")


@pytest.fixture
async def lab() -> AsyncIterator[PacketLab]:
    nodes = (Node(name="a", delay_ms=1), Node(name="b", nat="cone", delay_ms=1))
    async with packet_lab(Network(nodes=nodes)) as lab:
        yield lab


async def start(lab: PacketLab, node: str, program: Path, *arguments: object) -> Process:
    argv = [sys.executable, str(program), *map(str, arguments)]
    return await lab.run(node, argv, env=environment(), stdout=PIPE)


async def line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()


async def told(lab: PacketLab) -> tuple[int, int, int]:
    """Of the packets that b sends to a: how many come, how many different ones, how many after a later one."""
    hearer = await start(lab, "a", PROBE, "hear", lab.address("a"), 8)
    assert await line(hearer) == "ready"
    await (await start(lab, "b", PROBE, "tell", lab.address("a"), PACKETS)).wait()
    heard, different, early = map(int, (await line(hearer)).split())
    return heard, different, early


@pytest.mark.parametrize("kind", ["loss", "duplication", "reordering"])
async def test_packets_that_a_node_sends_meet_the_weather_until_it_ends(lab: PacketLab, kind: str) -> None:
    weather = await start(lab, "b", INSIDE, "weather", lab.address("b"), kind, 0.3, 1)
    assert await line(weather) == "ready"
    heard, different, early = await told(lab)
    if kind == "loss":
        assert 0.55 * PACKETS < heard == different < 0.85 * PACKETS and early == 0
    elif kind == "duplication":
        assert different == PACKETS and 1.15 * PACKETS < heard < 1.45 * PACKETS
    else:
        assert heard == different == PACKETS and early > 0.05 * PACKETS
    weather.terminate()
    assert await weather.wait() == 0
    assert await told(lab) == (PACKETS, PACKETS, 0)


async def test_a_node_without_ports_cannot_dial_until_it_has_them_again(lab: PacketLab) -> None:
    assert await line(await start(lab, "a", PROBE, "answer", lab.address("a"))) == "ready"

    async def dial() -> str:
        return await line(await start(lab, "b", PROBE, "dial", lab.address("a")))

    assert await dial() == "connected"
    ports = await start(lab, "b", INSIDE, "ports")
    assert await line(ports) == "ready"
    assert await dial() == "Cannot assign requested address"
    ports.terminate()
    await ports.wait()
    assert await dial() == "connected"
