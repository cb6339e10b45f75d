"""How much the processes of a sandbox use, read from the sandbox's own /proc.

Resident memory is summed first, because it is cheap to read; where that sum is over the limit, each process's
proportional share decides, so that pages which a fork shares with its parent are counted once.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Positions in /proc/PID/stat behind the command's closing parenthesis.
_USER_TICKS, _SYSTEM_TICKS, _NUM_THREADS, _RESIDENT_PAGES = 11, 12, 17, 21


@dataclass(frozen=True)
class Usage:
    tasks: int
    """Threads of all processes, the dead ones that nobody has waited for included."""
    resident_bytes: int
    cpu_s: float
    pids: tuple[int, ...]


def measure(leave_out: Container[int]) -> Usage:
    """What all processes of this process namespace use, those in `leave_out` excepted."""
    tasks = resident = ticks = 0
    pids = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in leave_out:
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                numbers = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # It has ended since the listing.
        tasks += int(numbers[_NUM_THREADS]) or 1
        resident += int(numbers[_RESIDENT_PAGES]) * PAGE_BYTES
        ticks += int(numbers[_USER_TICKS]) + int(numbers[_SYSTEM_TICKS])
        pids.append(int(name))
    return Usage(tasks, resident, ticks / TICKS_PER_SECOND, tuple(pids))


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def proportional_bytes(pids: tuple[int, ...]) -> int:
    """Memory of `pids` with shared pages divided among those that share them.

    A process that hides its map counts with all its resident memory.
    """
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                total += next(int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:"))
        except (OSError, StopIteration):
            total += resident_bytes(pid)
    return total
