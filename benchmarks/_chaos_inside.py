"""What goes wrong with a node's packets and ports, done from inside its network namespace until it is told to end.

    python _chaos_inside.py weather ADDRESS loss|jitter|duplication|reordering AMOUNT SEED
    python _chaos_inside.py ports

`weather`: packets that the node sends take a second TUN device; this process reads them there, lets them meet what the
lab's pure arithmetic (`shoal.lab.impairment`) says, and hands them to the node's own device. It needs no kernel module,
as `tc netem` does, and when it ends, its device and the route through it are gone. Packets that the node receives are
not touched: a path is struck in one direction.

`ports`: one port is left to dial out from, and that one is taken, so that no connection can be opened.

Either prints `ready` once it is in effect, and ends on SIGTERM or with its parent.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from shoal.coordinator.processes import die_with_parent
from shoal.lab.impairment import Way
from shoal.lab.network import MAX_MTU, Impairment
from shoal.lab.tun import CONTROL, DEVICE, IFF_NO_PI, IFF_TUN, TUNSETIFF

WEATHER_DEVICE = "weather"
LAB_NETWORK = "10.77.0.0/16"
ETH_P_IP = 0x0800

JITTER_DELAY_S = 0.05
"""Jitter needs a delay around which to vary: its own amount, at least this."""

REORDER_HOLD_S = 0.02

LONGEST_WAIT_S = 0.2

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
ONLY_PORT = 61000

ended = False


def end(*_: object) -> None:
    global ended
    ended = True


def impairment(kind: str, amount: float) -> Impairment:
    """What a weather does to packets."""
    match kind:
        case "loss":
            return Impairment(loss=amount)
        case "jitter":
            return Impairment(delay_s=max(amount, JITTER_DELAY_S), jitter_s=amount)
        case "duplication":
            return Impairment(duplicate=amount)
        case _:
            return Impairment(reorder=amount)


def weather(address: str, kind: str, amount: float, seed: int) -> None:
    """Let the node's packets meet it until told to end."""
    # The way back is another device than the way there, which strict checking would refuse.
    for name in ("all", DEVICE):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
    tun = os.open(CONTROL, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", WEATHER_DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as out:  # of no protocol: it receives nothing
        commands = f"link set {WEATHER_DEVICE} up\nroute add {LAB_NETWORK} dev {WEATHER_DEVICE} src {address}\n"
        subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)
        print("ready", flush=True)
        _forward(tun, out, Way(impairment(kind, amount), REORDER_HOLD_S, seed, address))
    os.close(tun)


def _forward(tun: int, out: socket.socket, way: Way) -> None:
    due: list[tuple[float, int, bytes]] = []
    number = 0
    while not ended:
        wait_s = LONGEST_WAIT_S if not due else max(0.0, min(LONGEST_WAIT_S, due[0][0] - time.monotonic()))
        readable, _, _ = select.select([tun], [], [], wait_s)
        now = time.monotonic()
        while readable:
            try:
                packet = os.read(tun, MAX_MTU)
            except BlockingIOError:
                break
            for at_s in way.send(now):
                number += 1
                heapq.heappush(due, (at_s, number, packet))
        while due and due[0][0] <= time.monotonic():
            try:
                out.sendto(heapq.heappop(due)[2], (DEVICE, ETH_P_IP))
            except OSError:
                continue  # the device's queue is full: a loss like any other


def ports() -> None:
    """Take the ports until told to end."""
    before = PORT_RANGE.read_text()
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", ONLY_PORT))
        holder.listen()
        PORT_RANGE.write_text(f"{ONLY_PORT} {ONLY_PORT}")
        print("ready", flush=True)
        while not ended:
            time.sleep(0.1)
        PORT_RANGE.write_text(before)


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGTERM, end)
    if sys.argv[1] == "ports":
        ports()
    else:
        weather(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))


if __name__ == "__main__":
    main()
