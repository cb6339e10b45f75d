"""The packet lab on real namespaces: no way past it, true rates and delays, losses, NATs, cuts, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from shoal.errors import ConfigError, NetworkError
from shoal.lab import namespaces
from shoal.lab.measure import Measurement, measure
from shoal.lab.network import Cut, Heal, Network, Node
from shoal.lab.packet import PacketLab, packet_lab

pytestmark = pytest.mark.netns

NODE = Path(__file__).with_name("node.py")
PORT = 4100


async def start(lab: PacketLab, node: str, role: str, *arguments: object) -> Process:
    """A program of `node.py` at a node, once it is ready."""
    argv = [sys.executable, str(NODE), role, *(str(argument) for argument in arguments)]
    process = await lab.run(node, argv, stdout=PIPE)
    if role in ("serve", "tick", "count"):
        assert await line(process) == "ready"
    return process


async def line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()


async def ask(lab: PacketLab, node: str, address: str, wait_s: float = 10.0) -> str:
    return await line(await start(lab, node, "ask", address, PORT, wait_s))


def plain(*nodes: str) -> Network:
    return Network(nodes=tuple(Node(name=name) for name in nodes))


async def flows(counter: Process, wanted: bool, wait_s: float = 20.0) -> bool:
    """Whether, before the wait is over, three intervals in a row have datagrams, or have none."""
    deadline, streak = time.monotonic() + wait_s, 0
    while streak < 3 and time.monotonic() < deadline:
        streak = streak + 1 if (int(await line(counter)) > 0) == wanted else 0
    return streak == 3


async def test_nothing_bypasses_the_switch() -> None:
    async with packet_lab(plain("a", "b")) as lab:
        for what, lines in (("link", 2), ("route", 1), ("-6 addr", 0)):
            process = await lab.run("a", ["ip", "-o", *what.split(), "show"], stdout=PIPE)
            shown = (await process.communicate())[0].decode().splitlines()
            assert len(shown) == lines, shown
            assert what != "route" or shown[0].startswith("default dev wan")
        counter = await start(lab, "b", "count", lab.address("b"), PORT)
        await start(lab, "a", "tick", lab.address("b"), PORT)
        assert await flows(counter, True)
        os.kill(lab.switch_pid, signal.SIGSTOP)
        try:
            assert await flows(counter, False)
        finally:
            os.kill(lab.switch_pid, signal.SIGCONT)
        assert await flows(counter, True)
        os.kill(lab.switch_pid, signal.SIGKILL)
        assert await flows(counter, False)
        process = await lab.run("a", ["ip", "route", "show"], stdout=PIPE)
        assert (await process.communicate())[0] == b""
        with pytest.raises(NetworkError, match="does not answer"):
            await lab.statistics()
        names = [lab.namespace("a"), lab.namespace("b")]
    assert not set(names) & set(namespaces.existing())


async def best_of_several(lab: PacketLab, source: str, target: str) -> tuple[float, float, str]:
    """The truest rate and delay of up to eight measurements: busy machines delay what the lab does not."""
    seen: list[Measurement] = []
    for _ in range(8):
        seen.append(await measure(lab, source, target, num_packets=150, flood_s=1.0))
        rate, delay = min(one.rate_error for one in seen), min(one.delay_error for one in seen)
        if max(rate, delay) < 0.05:
            break
    return rate, delay, repr(seen)


async def test_rate_and_delay_are_those_asked_for() -> None:
    network = Network(
        nodes=(
            Node(name="slow", up_mbps=5, down_mbps=20, delay_ms=40),
            Node(name="mid", up_mbps=50, down_mbps=200, delay_ms=10, nat="cone"),
            Node(name="fast", up_mbps=100, down_mbps=100),
        )
    )
    async with packet_lab(network) as lab:
        for source, target in (("slow", "mid"), ("mid", "fast"), ("fast", "mid")):
            rate_error, delay_error, seen = await best_of_several(lab, source, target)
            assert rate_error < 0.05 and delay_error < 0.05, seen
        counted = await lab.statistics()
        assert counted.device_drops == 0
        slow = counted.nodes["slow"].up
        assert slow.dropped_packets > 0 and 60_000 < slow.queue_high_water_bytes <= 62_500


async def test_the_yardstick_tells_a_wrong_network() -> None:
    """What is asked comes from the description, what is seen from the packets: here they are made to differ."""
    async with packet_lab(Network(nodes=(Node(name="a", up_mbps=10, delay_ms=20), Node(name="b")))) as lab:
        lab.network = Network(nodes=(Node(name="a", up_mbps=11, delay_ms=18), Node(name="b")))
        seen = await measure(lab, "a", "b", num_packets=50, flood_s=1.0)
        assert seen.asked_mbps == 11 and seen.rate_error > 0.05
        assert seen.asked_delay_ms == pytest.approx(18, abs=0.2) and seen.delay_error > 0.05


async def test_flows_share_the_uplink() -> None:
    network = Network(nodes=(Node(name="a", up_mbps=20), Node(name="b"), Node(name="c")))
    async with packet_lab(network) as lab:
        for node in "bc":
            await start(lab, node, "serve", lab.address(node), PORT)
        num_bytes = 2_000_000
        targets = [part for node in "bc" for part in (lab.address(node), PORT)]
        took_s = float(await line(await start(lab, "a", "fetch", num_bytes, *targets)))
        wire_bytes = (await lab.statistics()).nodes["a"].up.bytes
        # Not faster together than one link allows, whatever the machine does.
        assert wire_bytes >= 2 * num_bytes and took_s > 0.95 * wire_bytes * 8 / 20e6


async def test_loss_duplication_and_reordering_have_their_shares() -> None:
    network = Network(nodes=(Node(name="a", delay_ms=5), Node(name="b", loss=0.05, duplicate=0.1, reorder=0.1)), seed=3)
    async with packet_lab(network) as lab:
        num = 1500
        seen = await measure(lab, "a", "b", num_packets=num, gap_s=0.001, flood_s=0)
        assert seen.loss == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / num) ** 0.5)
        assert seen.sight.num_duplicates / num == pytest.approx(0.095, abs=5 * (0.1 * 0.9 / num) ** 0.5)
        assert seen.sight.num_overtaken > num * 0.03
        way = next(way for way in (await lab.statistics()).ways if way.source == "a")
        assert way.lost_packets >= num - seen.sight.num_spaced


async def test_nats_let_out_and_not_in() -> None:
    network = Network(
        nodes=(Node(name="router"), Node(name="x", nat="cone"), Node(name="y", nat="symmetric"), Node(name="z"))
    )
    async with packet_lab(network) as lab:
        for node in ("router", "x"):
            await start(lab, node, "serve", lab.address(node), PORT)
        for node in "xyz":
            assert await ask(lab, node, lab.address("router")) == lab.public_address(node)
        assert lab.address("x") != lab.public_address("x")
        for asking in ("router", "y", "z"):
            for address in (lab.public_address("x"), lab.address("x")):
                assert await ask(lab, asking, address, 0.3) == "failed TimeoutError"
        assert (await lab.statistics()).nodes["x"].nat_refused_packets >= 3


async def test_fragments_pass_a_nat() -> None:
    async with packet_lab(Network(nodes=(Node(name="x", nat="cone"), Node(name="router")))) as lab:
        code = (
            "import socket,sys;s=socket.socket(type=socket.SOCK_DGRAM);s.settimeout(10);"
            f"s.sendto(bytes(6000),('{lab.address('router')}',{PORT}));print(len(s.recv(9000)))"
        )
        echo = (
            f"import socket;s=socket.socket(type=socket.SOCK_DGRAM);s.bind(('{lab.address('router')}',{PORT}));"
            "print('up',flush=True);d,a=s.recvfrom(9000);s.sendto(d+d[:5],a)"
        )
        server = await lab.run("router", [sys.executable, "-c", echo], stdout=PIPE)
        assert await line(server) == "up"
        assert await line(await lab.run("x", [sys.executable, "-c", code], stdout=PIPE)) == "6005"


async def test_cut_one_way_both_ways_and_heal() -> None:
    async with packet_lab(plain("a", "b", "c")) as lab:
        counters = {node: await start(lab, node, "count", lab.address(node), PORT) for node in "ab"}
        await start(lab, "a", "tick", lab.address("b"), PORT)
        await start(lab, "b", "tick", lab.address("a"), PORT)
        assert await flows(counters["a"], True) and await flows(counters["b"], True)
        await lab.cut("a", "b", one_way=True)
        assert await flows(counters["b"], False) and await flows(counters["a"], True)
        await lab.partition(["a"], ["b", "c"])
        assert await flows(counters["a"], False)
        await lab.heal()
        assert await flows(counters["a"], True) and await flows(counters["b"], True)
        await lab.isolate("b")
        assert await flows(counters["a"], False) and await flows(counters["b"], False)
        with pytest.raises(ConfigError, match="'z'"):
            await lab.cut("a", "z")
        with pytest.raises(ConfigError, match="'z'"):
            await lab.run("z", ["true"])


async def test_script_plays_in_order() -> None:
    events = (Heal(at_s=0.4), Cut(source="a", target="b", at_s=0.1))
    async with packet_lab(Network(nodes=(Node(name="a"), Node(name="b")), events=events)) as lab:
        begun = time.monotonic()
        await lab.play()
        assert [event for _, event in lab.history] == [events[1], events[0]]
        assert all(at >= begun + event.at_s for at, event in lab.history)


def waits(condition: object, wait_s: float = 20.0) -> bool:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


HOLDER = """
import asyncio, sys
from shoal.lab.network import Network, Node
from shoal.lab.packet import packet_lab

async def main():
    async with packet_lab(Network(nodes=(Node(name="k1"), Node(name="k2")))) as lab:
        process = await lab.run("k1", ["sh", "-c", "sleep 1000 & echo; sleep 1000"], stdout=-1)
        await process.stdout.readline()
        print(lab.switch_pid, process.pid, lab.namespace("k1"), lab.namespace("k2"), flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


async def another_lab() -> None:
    """It sweeps at its start."""
    async with packet_lab(plain("a")) as lab:
        assert lab.namespace("a") in namespaces.existing()


@pytest.mark.parametrize("also_the_switch", [False, True])
def test_a_killed_lab_leaves_nothing(also_the_switch: bool) -> None:
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER)], stdout=subprocess.PIPE, text=True)
    with holder:
        try:
            assert holder.stdout is not None
            switch, process, *names = holder.stdout.readline().split()
            assert set(names) <= set(namespaces.existing())
            inside = namespaces.processes_in(names)
            assert int(process) in inside and len(inside) >= 2
            if also_the_switch:
                os.kill(int(switch), signal.SIGSTOP)  # so that it cannot clean up before it is killed
        finally:
            holder.kill()
    if also_the_switch:
        os.kill(int(switch), signal.SIGKILL)
        assert waits(lambda: namespaces.start_ticks(int(switch)) is None)
        assert set(names) <= set(namespaces.existing())
        asyncio.run(another_lab())
    assert waits(lambda: not set(names) & set(namespaces.existing()))
    assert waits(lambda: all(namespaces.start_ticks(pid) is None for pid in inside))
    assert waits(lambda: namespaces.start_ticks(int(switch)) is None)


async def test_sweep_spares_the_living() -> None:
    async with packet_lab(plain("a")) as lab, packet_lab(plain("a")) as other:
        assert namespaces.sweep() == []
        assert {lab.namespace("a"), other.namespace("a")} <= set(namespaces.existing())


async def test_failed_set_up_is_told_and_undone() -> None:
    lab = PacketLab(plain("a", "b"))
    name = lab.namespace("a")
    namespaces.ip("netns", "add", name)  # in the way
    with pytest.raises(NetworkError, match="netns"):
        async with lab:
            pass
    assert name not in namespaces.existing()
