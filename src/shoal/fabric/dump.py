"""What this process does at this very moment, as text: for a person who wants to know why it hangs.

Stacks name files, lines and functions, never values, so no secret of a variable gets out; what looks like one in a
log line or a path is blotted out. Invariants: looking changes nothing and waits for nothing; every section is cut at
`MAX_SECTION_CHARS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import platform
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import shoal
from shoal.fabric.log_ring import log_ring, redacted
from shoal.fabric.waits import in_words, num_unlisted, open_waits
from shoal.protocol.status import MAX_SECTION_CHARS, MAX_SECTIONS, LogRequest, clipped

MAX_TASKS = 1000
MAX_FRAMES = 64
MAX_FILES = 512
LOG_LINES = 100


def sections(own: Mapping[str, str]) -> dict[str, str]:
    """All that can be told; `own` is what the node adds of its own: leases, queues, counters. Call it on the loop."""
    found = {
        "process": _process(),
        "waits": _waits(),
        **own,
        "tasks": _tasks(),
        "threads": _threads(),
        "open files": _files(),
        "log": "\n".join(line.text for line in log_ring().read(LogRequest(limit=LOG_LINES)).lines),
    }
    assert len(found) <= MAX_SECTIONS
    return {title: clipped(redacted(text), MAX_SECTION_CHARS) for title, text in found.items()}


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _process() -> str:
    times = os.times()
    lines = [
        f"process {os.getpid()} on {platform.node()}",
        f"Shoal {shoal.__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}",
        f"resident {resident_bytes() / 2**20:.0f} MiB, processor time {times.user + times.system:.1f} s",
        f"threads {threading.active_count()}, objects tracked {len(gc.get_objects())}",
    ]
    with contextlib.suppress(OSError):
        lines.append("load " + " ".join(f"{load:.1f}" for load in os.getloadavg()))
    return "\n".join(lines)


def _waits() -> str:
    lines = [("  " if wait.nested else "") + in_words(wait) for wait in open_waits()]
    if num_unlisted():
        lines.append(f"and {num_unlisted()} since the beginning that were not listed")
    return "\n".join(lines) or "none"


def _tasks() -> str:
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return "no loop runs in this thread"
    parts = [f"{len(tasks)} tasks"]
    for task in sorted(tasks, key=lambda task: task.get_name())[:MAX_TASKS]:
        parts.append(f"{task.get_name()}: {_name_of(task.get_coro())}\n{_frames(_chain(task.get_coro()))}")
    return "\n".join(parts)


def _chain(coroutine: Any) -> Iterable[FrameType]:
    """The frames of a waiting coroutine, from the outermost in: each one awaits the next."""
    for _ in range(MAX_FRAMES):
        frame = next((f for n in ("cr_frame", "gi_frame", "ag_frame") if (f := getattr(coroutine, n, None))), None)
        if frame is None:
            return
        yield frame
        coroutine = next(
            (f for n in ("cr_await", "gi_yieldfrom", "ag_await") if (f := getattr(coroutine, n, None)) is not None),
            None,
        )


def _frames(frames: Iterable[FrameType]) -> str:
    summary = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
    return "".join(summary.format()).rstrip("\n")


def _name_of(coroutine: Any) -> str:
    return str(getattr(coroutine, "__qualname__", type(coroutine).__name__))


def _threads() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame, limit=MAX_FRAMES)).rstrip("\n")
        parts.append(f"{names.get(ident, ident)}\n{stack}")
    return "\n\n".join(parts)


def _files() -> str:
    try:
        numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    except OSError:
        return "this system does not say"
    lines = [f"{len(numbers)} open"]
    for number in numbers[:MAX_FILES]:
        with contextlib.suppress(OSError):  # It was closed meanwhile.
            lines.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return "\n".join(lines)
