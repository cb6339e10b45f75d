"""Programs that feel a fault. `python fault_probe.py ROLE …`, each prints what it found."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import _chaos_disk
from _chaos_disk import Disk, own_mounts

SLOW_BYTES_PER_S = 100_000


async def disk(folder: Path) -> None:
    """A disk that is filled, read-only, slow, and sound again each time; in mounts of this process's own."""
    own_mounts()
    one = Disk(folder / "disk")
    await one.open()
    try:
        file = one.path / "file"
        print("whole", write(file, 2**20))
        one.fill()
        print("full", write(file, 2**20), write(one.path / "new", 2**14))
        one.empty()
        print("emptied", write(file, 2**20))
        with file.open("ab", buffering=0) as kept:
            await one.cover()
            print("read-only", write(file, 10), write(one.path / "new", 10), kept.write(b"kept"))
        await one.uncover()
        print("uncovered", write(file, 10))
        if _chaos_disk.can_slow():
            one.set_rate(SLOW_BYTES_PER_S)
            began_s = time.monotonic()
            write(file, 3 * SLOW_BYTES_PER_S)
            print("slow", time.monotonic() - began_s > 1.5)
            one.set_rate(0)
    finally:
        await one.close()
    print("closed", os.listdir(one.path), os.listdir(folder))


def write(path: Path, num_bytes: int) -> str:
    """Write so much and see it on the disk; how that failed, if it did."""
    try:
        with path.open("wb", buffering=0) as file:
            written = file.write(bytes(num_bytes))
            os.fsync(file.fileno())
            return "ok" if written == num_bytes else "cut"
    except OSError as error:
        return os.strerror(error.errno or 0).replace(" ", "-")


def hear(address: str, seconds: float) -> None:
    """Numbered datagrams: how many came, how many of them once, how many in order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind((address, 4200))
        end.settimeout(0.1)
        print("ready", flush=True)
        deadline, heard = time.monotonic() + seconds, []
        while time.monotonic() < deadline:
            try:
                heard.append(int(end.recv(100)))
            except TimeoutError:
                continue
        early = sum(later < earlier for earlier, later in pairwise(heard))
        print(len(heard), len(set(heard)), early, flush=True)


def tell(address: str, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        for number in range(count):
            end.sendto(b"%d" % number, (address, 4200))
            time.sleep(0.002)


def dial(address: str) -> None:
    try:
        with socket.create_connection((address, 4300), 10):
            print("connected", flush=True)
    except OSError as error:
        print(os.strerror(error.errno or 0), flush=True)


def answer(address: str) -> None:
    with socket.create_server((address, 4300)) as server:
        print("ready", flush=True)
        while True:
            server.accept()[0].close()


if __name__ == "__main__":
    role, where, *rest = sys.argv[1:]
    match role:
        case "disk":
            asyncio.run(disk(Path(where)))
        case "hear":
            hear(where, float(rest[0]))
        case "tell":
            tell(where, int(rest[0]))
        case "dial":
            dial(where)
        case "answer":
            answer(where)
