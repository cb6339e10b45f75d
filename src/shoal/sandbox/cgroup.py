"""A control group for one sandbox, where this process may make one.

It is a second wall: without it the supervisor inside measures and kills, with it the kernel does, in one step and
for memory that belongs to no process as well. It is used where the unified hierarchy (version 2) has, above this
process's own group, one that this user may write to and that controls memory and processes below it: for an ordinary
user systemd's session offers that, for root nearly any host; containers and the old hierarchy do not.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.sandbox.job import Limits

OVERHEAD_BYTES = 256 << 20
"""For the supervisor, the interpreters' own files in the page cache, and preloaded modules."""

_counter = itertools.count()


@dataclass(frozen=True)
class Cgroup:
    folder: Path

    def ran_out_of_memory(self) -> bool:
        with suppress(OSError):
            for line in (self.folder / "memory.events").read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill" and int(count) > 0:
                    return True
        return False

    def remove(self) -> None:
        """Kills whatever is left in it. A group that cannot be removed yet is left empty, which costs nothing."""
        with suppress(OSError):
            (self.folder / "cgroup.kill").write_text("1", encoding="ascii")
        with suppress(OSError):
            self.folder.rmdir()


def parent_group(mounts: str = "/proc/self/mounts", membership: str = "/proc/self/cgroup") -> Path | None:
    """The folder in which groups with memory and process limits can be made; None where there is none."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8").splitlines()
        root = next((line.split()[1] for line in lines if line.split()[2] == "cgroup2"), None)
        groups = Path(membership).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in groups if line.startswith("0::")), None)
    if root is None or own is None:
        return None
    top = Path(root)
    folder = top / own.strip("/")
    # A group with processes in it cannot control groups below it, so it is a group further up that can.
    for candidate in (folder, *folder.parents):
        try:
            offered = (candidate / "cgroup.subtree_control").read_text(encoding="ascii").split()
        except OSError:
            return None
        if {"memory", "pids"} <= set(offered) and os.access(candidate / "cgroup.procs", os.W_OK):
            return candidate if os.access(candidate, os.W_OK) else None
        if candidate == top:
            break
    return None


def create(parent: Path, limits: Limits) -> Cgroup | None:
    """A new group with the limits set; None where the kernel refuses."""
    group = Cgroup(parent / f"shoal-sandbox-{os.getpid()}-{next(_counter)}")
    values = {
        "memory.max": limits.memory_bytes + limits.scratch_bytes + OVERHEAD_BYTES,
        "memory.oom.group": 1,
        "pids.max": limits.processes + 16,
    }
    try:
        group.folder.mkdir()
        for name, value in values.items():
            (group.folder / name).write_text(str(value), encoding="ascii")
        with suppress(FileNotFoundError):  # A kernel without swap accounting.
            (group.folder / "memory.swap.max").write_text("0", encoding="ascii")
    except OSError:
        group.remove()
        return None
    return group
