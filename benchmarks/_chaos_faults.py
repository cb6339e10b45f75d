"""Carries a fault script out on a swarm: every fault is the real thing, and is undone when its time is over.

`Injected` says when each fault was in effect; what may fail meanwhile is judged by it (`excused`, `stopped`), and how
long what was struck took to come back is measured from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from _chaos_checks import Mark, Span, recovery_s
from _chaos_disk import can_slow, command
from _chaos_script import WEATHERS, Fault, Script
from _chaos_swarm import Swarm
from shoal.errors import RunError
from shoal.lab.network import Cut, Event, Isolate, Partition

CLOCK = Path(__file__).with_name("_chaos_clock.c")

REDIAL_S = 3.0
"""A node whose ports are exhausted is cut off for so long, so that it must dial anew."""

RECOVERY_S = 180.0
"""What has not come back by then has not recovered."""

SETTLE_S = 3.0
"""Requests may still fail for so long after a server has been given its descriptors, disk or time again."""

COLD_START_S = 180.0
"""A server that was started has answered by then: it imports its engine, joins the run and loads a version, on a
machine that is busy with all that goes on."""

KILLS = ("kill_worker", "kill_relay", "kill_learner", "kill_server", "restart_coordinator", "restart_router")


class Injected(msgspec.Struct):
    """A fault that was carried out.

    Attributes:
        begun_s, ended_s: on the monotonic clock.
        restarted_s: when what was killed was started again.
        back_s: when a router that came back had everybody again.
        struck: whether there was anything to strike.
    """

    fault: Fault
    begun_s: float
    ended_s: float = 0.0
    restarted_s: float = 0.0
    back_s: float = 0.0
    struck: bool = True


def missing() -> dict[str, str]:
    """Kinds of fault that this machine cannot have, and why."""
    found = {}
    if shutil.which("cc") is None:
        found["clock_jump"] = "there is no C compiler (apt-get install gcc libc6-dev)"
    if not can_slow():
        found["disk_slow"] = "there is no blkio controller of cgroup v1"
    return found


async def clocks(script: Script, folder: Path) -> dict[str, dict[str, str]]:
    """By node, the environment of processes whose clock will jump; the machine's own clock is never touched."""
    nodes = {fault.targets[0] for fault in script.faults if fault.kind == "clock_jump"}
    library = folder / "clock.so"
    if nodes:
        await command("cc", "-O2", "-shared", "-fPIC", "-o", library, CLOCK)
    for node in nodes:
        set_clock(folder, node, 0.0)
    return {node: {"LD_PRELOAD": str(library), "SHOAL_CLOCK": str(_clock_file(folder, node))} for node in nodes}


def set_clock(folder: Path, node: str, offset_s: float) -> None:
    """From now on the clock of a node is off by so much. The file is written in place: processes have it mapped."""
    descriptor = os.open(_clock_file(folder, node), os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(descriptor, int(offset_s * 1e9).to_bytes(8, sys.byteorder, signed=True), 0)
    os.close(descriptor)


def _clock_file(folder: Path, node: str) -> Path:
    return folder / f"{node}.clock"


class Chaos:
    """Carries out one script."""

    def __init__(self, swarm: Swarm, script: Script) -> None:
        self.injected: list[Injected] = []
        self._swarm, self._script = swarm, script
        self._cuts: list[Event] = []
        self._returns: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """All faults, each at its time; returns when the script's time is over and the last fault is undone.

        Raises:
            RunError: one could not be carried out.
        """
        begun_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for fault in self._script.faults:
                    group.create_task(self._strike(fault, begun_s))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        await asyncio.sleep(max(0.0, begun_s + self._script.seconds - time.monotonic()))

    async def returned(self) -> None:
        """Wait for routers that are still to be found by everybody."""
        await asyncio.gather(*self._returns)

    async def _strike(self, fault: Fault, begun_s: float) -> None:
        await asyncio.sleep(begun_s + fault.at_s - time.monotonic())
        injected = Injected(fault, time.monotonic())
        self.injected.append(injected)
        say(f"seed {self._script.seed}: {fault.kind} {' '.join(fault.targets)} for {fault.for_s:.1f} s")
        if fault.kind in KILLS:
            await self._kill(injected)
        elif fault.kind in WEATHERS:
            await self._weather(fault)
        elif fault.kind in ("partition", "one_way_cut"):
            await self._cut(fault)
        elif fault.kind.startswith("disk_"):
            await self._disk(fault)
        else:
            await self._other(injected)
        injected.ended_s = time.monotonic()

    async def _kill(self, injected: Injected) -> None:
        (part,) = injected.fault.targets
        if part == "learner":
            injected.struck = await self._swarm.kill(part)
            injected.restarted_s = time.monotonic()  # the run itself starts it again
            return
        keeper = self._swarm.keepers[part]
        keeper.may_run.clear()
        injected.struck = await self._swarm.kill(part)
        await asyncio.sleep(injected.fault.for_s)
        starts = len(keeper.starts_s)
        keeper.may_run.set()
        await self._swarm.until(lambda: len(keeper.starts_s) > starts, RECOVERY_S, f"new start of {part}")
        injected.restarted_s = keeper.starts_s[-1]
        if injected.fault.kind == "restart_router":
            self._returns.append(asyncio.create_task(self._return(injected, part)))

    async def _return(self, injected: Injected, router: str) -> None:
        """See when everybody has found the router again."""
        with contextlib.suppress(RunError):  # `recoveries` says that it is not back
            await self._swarm.until(lambda: self._swarm.is_reached(router), RECOVERY_S, f"connection to {router}")
            injected.back_s = time.monotonic()

    async def _weather(self, fault: Fault) -> None:
        (node,) = fault.targets
        address = self._swarm.lab.address(node)
        seed = str(self._script.seed)
        process = await self._swarm.inside(node, "weather", address, fault.kind, str(fault.amount), seed)
        try:
            await asyncio.sleep(fault.for_s)
        finally:
            process.terminate()
            await process.wait()

    async def _cut(self, fault: Fault) -> None:
        if fault.kind == "one_way_cut":
            source, target = fault.targets
            await self._cut_for(Cut(source=source, target=target, one_way=True), fault.for_s)
            return
        others = tuple(node.name for node in self._swarm.lab.network.nodes if node.name not in fault.targets)
        await self._cut_for(Partition(groups=(fault.targets, others)), fault.for_s)

    async def _cut_for(self, event: Event, for_s: float) -> None:
        """A cut for a while; other cuts stay as they are."""
        self._cuts.append(event)
        await self._swarm.lab.apply(event)
        await asyncio.sleep(for_s)
        self._cuts.remove(event)
        await self._swarm.lab.heal()
        for other in self._cuts:
            await self._swarm.lab.apply(other)

    async def _disk(self, fault: Fault) -> None:
        disk = self._swarm.disks[fault.targets[0]]
        match fault.kind:
            case "disk_full":
                await asyncio.to_thread(disk.fill)
                await asyncio.sleep(fault.for_s)
                disk.empty()
            case "disk_read_only":
                await disk.cover()
                await asyncio.sleep(fault.for_s)
                await disk.uncover()
            case _:
                disk.set_rate(int(fault.amount))
                await asyncio.sleep(fault.for_s)
                disk.set_rate(0)

    async def _other(self, injected: Injected) -> None:
        fault = injected.fault
        (target,) = fault.targets
        match fault.kind:
            case "pause":
                pid = self._swarm.pid(target)
                injected.struck = pid is not None
                if pid is not None:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(fault.for_s)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            case "clock_jump":
                set_clock(self._swarm.folder, target, fault.amount)
                await asyncio.sleep(fault.for_s)
                set_clock(self._swarm.folder, target, 0.0)
            case "port_exhaustion":
                process = await self._swarm.inside(target, "ports")
                await self._cut_for(Isolate(node=target), min(REDIAL_S, fault.for_s))
                await asyncio.sleep(max(0.0, fault.for_s - REDIAL_S))
                process.terminate()
                await process.wait()
            case _:
                injected.struck = await self._without_descriptors(self._swarm.pid(target), fault.for_s)

    async def _without_descriptors(self, pid: int | None, for_s: float) -> bool:
        """A live process may open nothing more for a while."""
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
            await asyncio.sleep(for_s)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            return True
        return False


def stopped(injected: Iterable[Injected]) -> list[Span]:
    """When the server was stopped, or its disk held up."""
    return [
        (one.begun_s, one.ended_s)
        for one in injected
        if one.fault.kind in ("pause", "disk_slow") and "server" in one.fault.targets
    ]


def excused(injected: Iterable[Injected], starts_s: Iterable[float], answers_s: Iterable[float]) -> list[Span]:
    """When the server was not there or lacked what it needs: killed, starting, without descriptors, disk or time; or
    when its clients, which are on its node, had no port to ask from.

    Args:
        starts_s: when its process was started.
        answers_s: when it answered.
    """
    answers_s = sorted(answers_s)
    spans = [
        (start_s, min([start_s + COLD_START_S, *(at_s for at_s in answers_s if at_s > start_s)]))
        for start_s in starts_s
    ]
    for one in injected:
        kind = one.fault.kind
        if "server" not in one.fault.targets:
            continue
        if kind in ("kill_server", "descriptor_exhaustion", "port_exhaustion", "clock_jump") or kind.startswith(
            "disk_"
        ):
            spans.append((one.begun_s, one.ended_s + SETTLE_S))
    return spans


RECOVERS = {
    "kill_worker": ("worker", "worker-1"),
    "kill_relay": ("relay", "worker-0"),
    "kill_learner": ("learner", "step"),
    "kill_server": ("server", "answer"),
    "restart_coordinator": ("coordinator", "start"),
}
"""By kind: what recovers, and by which mark one sees it."""


def recoveries(injected: Iterable[Injected], marks: Iterable[Mark]) -> list[dict[str, object]]:
    """How long each killed part took from its new start to its first work, and whether nothing else was wrong."""
    injected, marks = list(injected), list(marks)
    rows: list[dict[str, object]] = []
    for one in injected:
        if not one.struck or one.fault.kind not in KILLS:
            continue
        if one.fault.kind == "restart_router":
            part, took_s = "router", one.back_s - one.restarted_s if one.back_s else None
        else:
            part, what = RECOVERS[one.fault.kind]
            took_s = recovery_s(marks, what, one.restarted_s)
        until_s = one.restarted_s + (RECOVERY_S if took_s is None else took_s)
        alone = not any(
            other is not one and other.begun_s <= until_s and one.begun_s <= other.ended_s + SETTLE_S
            for other in injected
        )
        rows.append({"part": part, "took_s": took_s, "alone": alone})
    return rows


def say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)
