"""Network namespaces of a lab: their names, what runs in them, and how they go away.

A name is `shoal-lab-PID-START-NUMBER-NODE`: process id and start time of the owner (which together are never used
twice), the number of the lab in that process, and the node. So whoever comes later can tell whose owner is dead.

Invariant: `remove` kills only processes inside the namespaces it removes, and `sweep` touches only namespaces of this
form whose owner is dead.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import NetworkError

FOLDER = Path("/run/netns")
"""Where `ip netns` keeps names."""

KILL_WAIT_S = 5.0
"""Killed processes have this long to leave a namespace."""

IP_TIMEOUT_S = 30.0

FORM = re.compile(r"shoal-lab-(\d+)-(\d+)-(\d+)-([a-z][a-z0-9-]*)")


@dataclass(frozen=True)
class Owner:
    """A lab: the process that made it, and its number there."""

    pid: int
    start_ticks: int
    number: int

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return start_ticks(self.pid) == self.start_ticks

    def namespace(self, node: str) -> str:
        return f"shoal-lab-{self.pid}-{self.start_ticks}-{self.number}-{node}"


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; `None` if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def existing() -> dict[str, tuple[Owner, str]]:
    """Every lab namespace on this machine: name to owner and node."""
    names = sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []
    found = {name: FORM.fullmatch(name) for name in names}
    return {
        name: (Owner(int(match[1]), int(match[2]), int(match[3])), match[4]) for name, match in found.items() if match
    }


def ip(*arguments: str, commands: Sequence[str] = ()) -> None:
    """Run iproute2; with `commands`, all of them in one process.

    Raises:
        NetworkError: it is missing or refuses.
    """
    command = ["ip", *arguments, *(("-batch", "-") if commands else ())]
    try:
        done = subprocess.run(
            command, input="\n".join(commands), capture_output=True, text=True, timeout=IP_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise NetworkError("The program ip is missing.", "Install the package iproute2.") from None
    if done.returncode != 0:
        problem = f"{' '.join(command)} failed: {' '.join(done.stderr.split())}."
        raise NetworkError(problem, "The packet lab needs root and a kernel with network namespaces.")


def processes_in(names: Iterable[str]) -> list[int]:
    """Processes whose network is one of the namespaces."""
    inodes = set()
    for name in names:
        try:
            inodes.add((FOLDER / name).stat().st_ino)
        except FileNotFoundError:
            continue
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            if os.stat(f"/proc/{pid}/ns/net").st_ino in inodes:
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def remove(names: Sequence[str]) -> None:
    """Kill what runs in the namespaces and delete them; those already gone are fine."""
    deadline = time.monotonic() + KILL_WAIT_S
    while (pids := processes_in(names)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    left = [name for name in names if (FOLDER / name).exists()]
    if left:
        try:
            ip("-force", commands=[f"netns delete {name}" for name in left])
        except NetworkError:
            if any((FOLDER / name).exists() for name in left):  # otherwise somebody else deleted one just now
                raise


def sweep() -> list[str]:
    """Remove what dead owners left behind; returns the namespaces' names."""
    left = [name for name, (owner, _) in existing().items() if not owner.alive]
    if left:
        remove(left)
    return left
