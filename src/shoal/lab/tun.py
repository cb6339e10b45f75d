"""TUN devices in namespaces: a file descriptor that reads and writes the IP packets of a node.

The device is made inside the node's namespace by a process that stays outside, so the node has no handle on it, and
it goes away with that process. It is the namespace's only device beside loopback and carries its only route.
Segmentation offload is off: packets are those of the wire, and their checksums are complete.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shoal.errors import NetworkError
from shoal.lab import namespaces

DEVICE = "wan"
CONTROL = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000

QUEUE_PACKETS = 2000
"""What the kernel keeps for the switch while that is busy; beyond it packets are lost uncounted by the switch."""

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """What this machine lacks for TUN devices and namespaces, as one sentence; empty if nothing."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "The packet lab needs Linux."
    if os.geteuid() != 0:
        return "The packet lab needs root."
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"The packet lab needs the program {program} (package {package})."
    try:
        os.close(os.open(CONTROL, os.O_RDWR))
    except OSError as error:
        return f"The packet lab needs {CONTROL} (kernel module tun): {error.strerror}."
    return ""


def open_tun(namespace: str, address: str, mtu: int) -> int:
    """Make the namespace's device, address and default route; returns a non-blocking descriptor.

    Raises:
        NetworkError: the kernel refuses.
    """
    try:
        descriptor = _within(namespace, _attach)
    except OSError as error:
        problem = f"No TUN device can be made in {namespace}: {error.strerror}."
        raise NetworkError(problem, missing() or "Load the kernel module tun.") from None
    commands = [
        "link set dev lo up",
        f"addr add {address}/32 dev {DEVICE}",
        f"link set dev {DEVICE} mtu {mtu} txqueuelen {QUEUE_PACKETS} up",
        f"route add default dev {DEVICE}",
    ]
    try:
        namespaces.ip("-n", namespace, commands=commands)
    except NetworkError:
        os.close(descriptor)
        raise
    return descriptor


def device_drops(namespace: str) -> int:
    """Packets that the kernel dropped because the switch did not read them in time."""

    def read() -> int:
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == DEVICE:
                return int(counts.split()[11])
        return 0

    return _within(namespace, read)


def _attach() -> int:
    ipv6 = Path("/proc/sys/net/ipv6/conf")
    for part in ("all", "default"):
        if (ipv6 / part).exists():  # the lab speaks IPv4 only, so nothing should try anything else
            (ipv6 / part / "disable_ipv6").write_text("1")
    descriptor = os.open(CONTROL, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _within(namespace: str, act: Callable[[], T]) -> T:
    """Call `act` with this thread's network in the namespace, then come back."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(namespaces.FOLDER / namespace, os.O_RDONLY)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            return act()
        finally:
            _enter(home)
    finally:
        os.close(home)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
