"""One job under supervision: start, feed, read, measure, end, collect.

Invariants: a job ends at the first limit that it breaks, and everything it started ends with it; no more than
`output_bytes` of each stream and `scratch_bytes` of files are kept; a file is opened without following links.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import time
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from shoal.sandbox.guest import usage
from shoal.sandbox.guest.child import MEMORY_EXIT_CODE, SCRATCH, Started, spawn

FIRST_POLL_S, LAST_POLL_S = 0.02, 0.05
"""How often usage is measured: soon after the start, and later."""

MAX_SCRATCH_FILES = 20_000
"""Empty files cost kernel memory too, about a kilobyte each."""

SYSTEM_POLL_SLICE_S = 1.0
"""Usage is measured at the fast rate this long."""

_ABORT_SIGNALS = (signal.SIGTRAP, signal.SIGABRT, signal.SIGILL)


class Manager:
    """Supervises one job; `run` returns the reply for the host."""

    def __init__(self, control: socket.socket, limits: dict[str, Any], *, baseline_bytes: int) -> None:
        self.control = control
        self.limits = limits
        self.baseline_bytes = baseline_bytes
        self.reason = ""
        self.peak_bytes = 0
        self.output: dict[int, bytearray] = {}
        self.truncated: set[int] = set()

    def run(
        self, header: dict[str, Any], blobs: list[bytes], started: Started | None
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Does the job; its own process `started` may be waiting for it already."""
        begun = time.monotonic()
        for name, blob in zip(header["files"], blobs[1:], strict=True):
            if not _write(name, blob):
                self.reason = "output"
        process = started or spawn(header, self.limits)
        if self.reason:
            os.kill(process.pid, signal.SIGKILL)
        status = self._supervise(process, blobs[0], begun + self.limits["wall_s"])
        exit_code = os.waitstatus_to_exitcode(status)
        stdout, stderr = bytes(self.output[process.stdout]), bytes(self.output[process.stderr])
        names, contents, complete = self._collect(header["collect"])
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        kernel_peak = max(0, (spent.ru_maxrss << 10) - self.baseline_bytes)
        reply = {
            "exit_code": exit_code,
            "reason": self.reason or self._reason(exit_code, stderr, header["kind"]),
            "stdout_truncated": process.stdout in self.truncated,
            "stderr_truncated": process.stderr in self.truncated,
            "seconds": time.monotonic() - begun,
            "cpu_s": spent.ru_utime + spent.ru_stime,
            "peak_memory": max(self.peak_bytes, kernel_peak),
            "files": names,
            "files_truncated": not complete,
        }
        return reply, [stdout, stderr, *contents]

    def _supervise(self, process: Started, stdin: bytes, deadline: float) -> int:
        """Until the job's first process has ended; returns its status with everything else dead."""
        poll = select.poll()
        exit_fd = os.pidfd_open(process.pid)
        poll.register(exit_fd, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        for fd in (process.stdout, process.stderr):
            self.output[fd] = bytearray()
            poll.register(fd, select.POLLIN)
        unsent = memoryview(stdin)
        poll.register(process.stdin, select.POLLOUT)
        feeding, next_measure = True, 0.0
        while True:
            now = time.monotonic()
            if not self.reason and now >= deadline:
                self.reason = "time"
            if not self.reason and now >= next_measure:
                young = now < deadline - self.limits["wall_s"] + SYSTEM_POLL_SLICE_S
                next_measure = now + (FIRST_POLL_S if young else LAST_POLL_S)
                self._measure()
            if self.reason:
                break
            wait_s = max(0.001, min(next_measure, deadline) - now)
            ended = False
            for fd, _ in poll.poll(wait_s * 1000):
                if fd == self.control.fileno():
                    os._exit(3)  # The host has closed, or talks out of turn: there is nobody to work for.
                if fd == process.stdin:
                    unsent = _feed(fd, unsent)
                    if not unsent:
                        poll.unregister(fd)
                        os.close(fd)
                        feeding = False
                elif fd == exit_fd:
                    ended = True
                elif not self._read(fd):
                    poll.unregister(fd)
            if ended or self.reason:
                break
        if feeding:
            os.close(process.stdin)
        os.close(exit_fd)
        status = _end_everything(process.pid)
        for fd in (process.stdout, process.stderr):
            while fd not in self.truncated and self._read(fd):
                pass
        return status

    def _read(self, fd: int) -> bool:
        """Takes what is there; false at the end of the stream."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        kept = self.output[fd]
        room = self.limits["output_bytes"] - len(kept)
        kept += data[:room]
        if len(data) > room:
            self.truncated.add(fd)
            self.reason = self.reason or "output"
        return bool(data)

    def _measure(self) -> None:
        used = usage.measure(leave_out=(1, os.getpid()))
        limits = self.limits
        memory = used.resident_bytes - self.baseline_bytes
        if memory > limits["memory_bytes"]:
            memory = usage.proportional_bytes(used.pids) - self.baseline_bytes
        self.peak_bytes = max(self.peak_bytes, memory)
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        files = os.statvfs(SCRATCH)
        if memory > limits["memory_bytes"]:
            self.reason = "memory"
        elif used.tasks > limits["processes"]:
            self.reason = "processes"
        elif used.cpu_s + reaped.ru_utime + reaped.ru_stime > limits["cpu_s"]:
            self.reason = "time"
        elif files.f_files - files.f_ffree > MAX_SCRATCH_FILES:
            self.reason = "output"

    def _reason(self, exit_code: int, stderr: bytes, kind: str) -> str:
        if exit_code == 0:
            return "ok"
        if exit_code == -signal.SIGXCPU:
            return "time"
        if exit_code == -signal.SIGXFSZ:
            return "output"
        if kind == "python" and exit_code == MEMORY_EXIT_CODE:
            return "memory"
        if -exit_code in _ABORT_SIGNALS and (b"out of memory" in stderr.lower() or b"OOM" in stderr):
            return "memory"  # V8 and most allocators say so before they abort.
        return "exit" if exit_code > 0 else "killed"

    def _collect(self, names: list[str]) -> tuple[list[str], list[bytes], bool]:
        """Regular files under `names`, up to `scratch_bytes` together; and whether that was all."""
        found, contents = [], []
        room, complete = self.limits["scratch_bytes"], True
        for name in names:
            content = _read_file(name, room)
            if content is None:
                continue
            if len(content) > room:
                complete = False
                continue
            room -= len(content)
            found.append(name)
            contents.append(content)
        return found, contents, complete


def _feed(fd: int, data: memoryview) -> memoryview:
    """Writes what the pipe takes; returns the rest, empty where the reader is gone."""
    try:
        return data[os.write(fd, data[: 1 << 16]) :] if data else data
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _end_everything(pid: int) -> int:
    """Kills and reaps all processes of the sandbox but the supervisors; returns the status of `pid`.

    A fork cannot get away: the kernel refuses it to a process that a fatal signal waits for.
    """
    with suppress(ProcessLookupError):
        # The first process goes with the others only if it has not ended by itself: its own status is the job's.
        os.kill(-1, signal.SIGKILL)
    status = -1
    while True:
        try:
            ended, ended_status = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if ended == pid:
            status = ended_status


def _open_folder(parts: tuple[str, ...], *, make: bool) -> int:
    folder = os.open(SCRATCH, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def _write(name: str, content: bytes) -> bool:
    """False where the scratch folder is too small."""
    path = PurePosixPath(name)
    try:
        folder = _open_folder(path.parts[:-1], make=True)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(path.name, flags, 0o755, dir_fd=folder), "wb") as file:
                file.write(content)
        finally:
            os.close(folder)
    except OSError:
        return False
    return True


def _read_file(name: str, max_bytes: int) -> bytes | None:
    """At most one byte more than `max_bytes`; None where there is no regular file without links on the way."""
    path = PurePosixPath(name)
    try:
        folder = _open_folder(path.parts[:-1], make=False)
        try:
            fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(max_bytes + 1)
