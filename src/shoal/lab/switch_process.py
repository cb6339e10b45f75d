"""The packet lab's switch as a process of its own: devices and clock around `switch.Switch`.

It owns the lab's namespaces and devices. When its lab closes the control socket, or dies in whatever way, it kills
what still runs in the namespaces, deletes them and ends. It is started as
`python -m shoal.lab.switch_process DESCRIPTOR`.

How it keeps time: an idle switch sleeps until a packet comes or is due; a busy one looks once a tick, which costs a
fraction of the processor time that a wake-up for every packet would. Packets found at the end of a tick count as come
in its middle, and what is due within half a tick is handed on, so that delays are right on average and off by
half a tick or so each. It runs with the lowest real-time priority, where it may: a switch that waits for a processor
shows as delay, and a nice value counts only among the processes of one session.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.lab import namespaces, tun
from shoal.lab.capture import PacketFile
from shoal.lab.control import (
    MAX_LINE_BYTES,
    AskStatistics,
    Counted,
    Done,
    Failed,
    Ready,
    Reply,
    Request,
    SetCuts,
    SetUp,
)
from shoal.lab.network import MAX_MTU
from shoal.lab.switch import Switch

READ_BATCH = 64
"""Packets read from one node before the others get their turn."""

IDLE_S = 1.0
"""Longest sleep: a dead parent that left its socket open in another process is noticed this late."""

REAL_TIME_PRIORITY = 1
"""Of 99; enough to go before every ordinary process."""


class SwitchProcess:
    """Everything between set-up and the end of the control socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._parent = os.getppid()
        self._buffer = bytearray()
        self._decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
        self._switch: Switch | None = None
        self._tuns: list[int] = []
        self._namespaces: list[str] = []
        self._tick_s = 0.0
        self._late_max_s = 0.0
        self._device_errors = 0
        self._captures: list[PacketFile] = []
        self._epoch_s = time.time() - time.monotonic()

    def run(self) -> None:
        """Serve until the lab is gone, then clean up."""
        self._control.setblocking(False)
        try:
            self._forward()
        finally:
            for capture in self._captures:
                capture.close()
            for descriptor in self._tuns:
                os.close(descriptor)
            namespaces.remove(self._namespaces)

    def _forward(self) -> None:
        poll = select.epoll()
        control = self._control.fileno()
        poll.register(control, select.EPOLLIN)
        places: dict[int, int] = {}
        looked_s = time.monotonic()
        while os.getppid() == self._parent:
            ready = poll.poll(0)
            now_s = time.monotonic()
            arrived_s = (looked_s + now_s) / 2
            if not ready and (wait_s := self._wait_s(now_s)) > 0:
                # select waits with microseconds, epoll only with milliseconds: wait with the one for the other.
                select.select([poll], [], [], wait_s)
                ready = poll.poll(0)
                arrived_s = now_s = time.monotonic()
            looked_s = now_s
            for descriptor, _ in ready:
                if descriptor == control:
                    if not self._serve():
                        return
                    for place, tun_descriptor in enumerate(self._tuns):
                        if tun_descriptor not in places:
                            places[tun_descriptor] = place
                            poll.register(tun_descriptor, select.EPOLLIN)
                else:
                    self._read(descriptor, places[descriptor], arrived_s)
            self._write()
            pause_s = self._tick_s - (time.monotonic() - looked_s)
            if pause_s > 0:
                time.sleep(pause_s)

    def _wait_s(self, now_s: float) -> float:
        due_s = self._switch.next_s if self._switch is not None else None
        return IDLE_S if due_s is None else min(due_s - now_s, IDLE_S)

    def _read(self, descriptor: int, place: int, arrived_s: float) -> None:
        assert self._switch is not None
        for _ in range(READ_BATCH):
            try:
                packet = os.read(descriptor, MAX_MTU)
            except BlockingIOError:
                return
            if self._captures:
                self._captures[place].write(packet, self._epoch_s + arrived_s)
            self._switch.receive(place, packet, arrived_s)

    def _write(self) -> None:
        switch = self._switch
        if switch is None or (due_s := switch.next_s) is None:
            return
        now_s = time.monotonic()
        self._late_max_s = max(self._late_max_s, now_s - due_s)
        for place, packet in switch.release(now_s + self._tick_s / 2):
            try:
                os.write(self._tuns[place], packet)
            except OSError:
                self._device_errors += 1  # the kernel could not take it: a loss like any other
                continue
            if self._captures:
                self._captures[place].write(packet, self._epoch_s + now_s)

    def _serve(self) -> bool:
        """Answer what came over the control socket; false when the lab has closed it."""
        try:
            chunk = self._control.recv(2**16)
        except ConnectionError:
            return False
        if not chunk:
            return False
        self._buffer += chunk
        assert len(self._buffer) <= MAX_LINE_BYTES
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            try:
                reply = self._answer(self._decoder.decode(line))
            except ShoalError as error:
                reply = Failed(error.problem, error.remedy)
            self._control.setblocking(True)
            self._control.sendall(msgspec.json.encode(reply) + b"\n")
            self._control.setblocking(False)
        return True

    def _answer(self, request: Request) -> Reply:
        match request:
            case SetUp():
                self._set_up(request)
                return Ready()
            case SetCuts(pairs=pairs, restart=restart):
                assert self._switch is not None
                self._switch.set_cuts(pairs)
                for place in restart:
                    self._switch.forget_sessions(place)
                return Done()
            case AskStatistics():
                assert self._switch is not None
                statistics = msgspec.structs.replace(
                    self._switch.statistics(),
                    device_drops=self._device_errors + sum(tun.device_drops(name) for name in self._namespaces),
                    late_max_s=self._late_max_s,
                    cpu_s=time.process_time(),
                    uncaptured_packets=sum(capture.omitted_packets for capture in self._captures),
                )
                return Counted(statistics)

    def _set_up(self, request: SetUp) -> None:
        namespaces.sweep()
        network = request.network
        owner = namespaces.Owner(request.owner_pid, request.owner_start_ticks, request.number)
        self._namespaces = [owner.namespace(node.name) for node in network.nodes]
        namespaces.ip(commands=[f"netns add {name}" for name in self._namespaces])
        for node, name in zip(network.nodes, self._namespaces, strict=True):
            self._tuns.append(tun.open_tun(name, network.address(node.name), network.mtu))
        if request.capture:
            self._captures = [PacketFile(Path(request.capture) / f"{node.name}.pcap") for node in network.nodes]
        self._tick_s = network.tick_ms / 1e3
        self._switch = Switch(network)
        gc.collect()
        gc.disable()  # packets form no cycles, and a collection would show as delay


def main() -> None:
    """Entry point: `argv[1]` is the descriptor of the control socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the lab ends it, by closing the socket
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(REAL_TIME_PRIORITY))
    with socket.socket(fileno=int(sys.argv[1])) as control:
        SwitchProcess(control).run()


if __name__ == "__main__":
    main()
