"""Ends what a server has started and left behind when it ended itself.

A server's processes are known by a token in the environment that they inherited, whatever they did with their groups
and sessions. Linux only: elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

TOKEN_VARIABLE = "SHOAL_MCP_SERVER"


def end_processes(token: str) -> int:
    """Kill every process of ours that carries the token; gives how many there were."""
    if sys.platform != "linux":
        return 0
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    ended = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or not _carries(entry, wanted):
            continue
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(int(entry.name))
            try:
                if _carries(entry, wanted):  # Still the same one, now that it is held.
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    ended += 1
            finally:
                os.close(process)
    return ended


def _carries(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
