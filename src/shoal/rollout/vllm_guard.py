"""Starts vLLM and sees to it that nothing of it outlives the worker; run by vLLM's own Python, so stdlib only.

    python vllm_guard.py COMMAND…        its standard input is a pipe that the worker holds open

vLLM's server starts an engine process, and that may start others. This process adopts whatever of them is orphaned
(`PR_SET_CHILD_SUBREAPER`), and ends all of them when the server has ended, when it is told to (SIGTERM), or when its
standard input ends, which it does however the worker dies. Invariants: it ends only when it has no descendant left; its
exit code is the server's, or 0 where it was told to end.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

GRACE_S = 5.0
"""After SIGTERM; what is left is killed."""

LOOK_S = 0.2


def descendants() -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    below = [int(child) for child in file.read().split()]
                found += below
                todo += below
    return found


def reap(server: int) -> int | None:
    """Take in whoever has ended; gives the server's exit code, if it was among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == server:
                code = os.waitstatus_to_exitcode(status)
    return code


def end_all(server: int) -> None:
    """End the server and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while (left := descendants()) and time.monotonic() < deadline:
        reap(server)
        time.sleep(0.05)
    while left := descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(server)
        time.sleep(0.02)


def main(command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    ).pid
    code = None
    while code is None and not told:
        ended, _, _ = select.select([0], [], [], LOOK_S)
        if ended and not os.read(0, 4096):
            break
        code = reap(server)
    end_all(server)
    return 0 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
