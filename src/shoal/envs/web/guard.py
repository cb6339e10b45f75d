"""The short life between us and Chromium: starts it, and ends everything it started when it or any of us has gone.

Run as a script by the interpreter alone (`-I -S`): `guard.py OWNER_PID SCRATCH PROGRAM ARGUMENT...`. The browser's
driver is its parent and talks to the browser through file descriptors that pass through untouched.

Invariant: when the owner or the driver ends, however that happens, or the browser does, no process that descends from
the browser is left, nor its profile or the folder SCRATCH. Where the guard itself is killed, the kernel kills the
browser, and its helpers follow that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

DRIVER_FDS = (3, 4)
"""What the driver and the browser talk through; held open here, neither would see the other end."""

FEATURES = "--disable-features="
PROFILE = "--user-data-dir="
DRIVERS_PROFILE = "playwright_chromiumdev_profile-"
"""Profiles of this name are made by the driver for one browser alone."""

SWEEPS_S = 5.0
"""How long descendants are looked for after the browser's end: killing one can show its orphans."""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
    return found


def _kill_descendants() -> None:
    """Ends all that descends from this process, which adopts what its descendants leave behind."""
    end = time.monotonic() + SWEEPS_S
    while time.monotonic() < end:
        pending, every = _children(os.getpid()), []
        while pending:
            one = pending.pop()
            every.append(one)
            pending += _children(one)
        for one in every:
            with contextlib.suppress(OSError):
                os.kill(one, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not _children(os.getpid()):
            return
        time.sleep(0.01)


def merged(arguments: list[str]) -> list[str]:
    """The browser takes the last list of features alone: those of its driver and ours become one."""
    kept = [one for one in arguments if not one.startswith(FEATURES)]
    lists = [one.removeprefix(FEATURES) for one in arguments if one.startswith(FEATURES)]
    # Behind the program, before an address that may come last.
    return [*kept[:1], *([FEATURES + ",".join(lists)] if lists else []), *kept[1:]]


def _ended(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(owner: int, scratch: str, command: list[str]) -> NoReturn:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    watched = [os.pidfd_open(owner), os.pidfd_open(os.getppid())]
    guard = os.getpid()
    browser = os.fork()
    if browser == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)
        os.execv(command[0], merged(command))
    for fd in DRIVER_FDS:
        with contextlib.suppress(OSError):
            os.close(fd)
    poll = select.poll()
    for fd in [*watched, os.pidfd_open(browser)]:
        poll.register(fd, select.POLLIN)
    # Asked to end, it ends what it started first.
    signal.signal(signal.SIGTERM, _ended)
    with contextlib.suppress(KeyboardInterrupt):
        poll.poll()
    _kill_descendants()
    profiles = [one.removeprefix(PROFILE) for one in command if one.startswith(PROFILE)]
    for folder in [scratch, *(one for one in profiles if os.path.basename(one).startswith(DRIVERS_PROFILE))]:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    except OSError as problem:
        sys.exit(f"guard: {problem}")
