"""As whom a sandbox runs on the host.

An ordinary user's sandboxes run as that user, behind a user namespace. Root's never stay root: each is given a user
number of its own that nobody has. For the kernel, root in a namespace is still the owner of root's files, such as
`/proc/sys/kernel/core_pattern`, and the number of root's processes is not limited. So root that cannot become
another user gets no sandbox at all. The new user cannot walk into root's private folders, so what the sandbox
shows is first bind-mounted where it can, in a mount namespace of the launcher's own (`launcher.stage`).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from shoal.sandbox.errors import SandboxUnavailable

FIRST_UID, NUM_UIDS = 300_000, 200_000
"""Between the ranges that distributions hand to people and to containers."""

FIRST_UID_IN_CONTAINER, NUM_UIDS_IN_CONTAINER = 61_200, 4_000
"""Where only 65,536 users exist: the range for passing services."""

_CAP_SETGID, _CAP_SETUID, _CAP_SYS_ADMIN = 6, 7, 21

_counter = itertools.count()


@dataclass(frozen=True)
class Privileges:
    """`uid`: the user to become before anything else, None to stay; `stage`: whether to bind-mount what is shown."""

    uid: int | None
    stage: bool


def _uid_map() -> list[tuple[int, int, int]]:
    """First user here, the same one outside, and how many; of each range of this process's user namespace."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    return [(inside, outside, count) for inside, outside, count in ranges]


def choose() -> Privileges:
    """For one sandbox; root's next sandbox gets another user.

    Raises:
        SandboxUnavailable: this is root, and cannot become anybody else.
    """
    if os.geteuid() != 0:
        return Privileges(None, stage=False)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    bits = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    ranges = _uid_map()
    if bits >> _CAP_SETUID & 1 and bits >> _CAP_SETGID & 1:
        number = os.getpid() * 101 + next(_counter)
        for first, count in ((FIRST_UID, NUM_UIDS), (FIRST_UID_IN_CONTAINER, NUM_UIDS_IN_CONTAINER)):
            if any(inside <= first and first + count <= inside + length for inside, _, length in ranges):
                return Privileges(first + number % count, stage=bool(bits >> _CAP_SYS_ADMIN & 1))
    if any(inside == 0 and outside != 0 for inside, outside, _ in ranges):
        # The only user of a rootless container: root in name, an ordinary user to the kernel.
        return Privileges(None, stage=False)
    raise SandboxUnavailable(
        "This process is root and cannot become another user, so a sandbox would run as root.",
        "Run as an ordinary user, or give the container the capabilities SETUID and SETGID.",
    )
