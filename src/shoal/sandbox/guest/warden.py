"""The first process of a sandbox: it prepares, waits for jobs, and cleans up behind them.

    host ── boot ──▶ warden: imports, listens, may start a process ahead ── ready ──▶ host
    host ── job ───▶ manager (a fork of the warden; the warden itself where it does only one job) ── reply ──▶ host
                     warden: kills what is left, empties the scratch folder ── idle ──▶ host

Invariants: as the first of its process namespace it can be neither killed nor stopped from inside, and its end is
the end of every process in it; it ends when the host closes the connection. A warden that does several jobs never
reads one itself, so that no job finds traces of an earlier one in the memory it is forked from.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import stat
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from shoal.sandbox.guest import usage, wire
from shoal.sandbox.guest.child import SCRATCH, set_dumpable, spawn
from shoal.sandbox.guest.manager import Manager

_PR_SET_CHILD_SUBREAPER = 36
_BACKLOG = 64
_MAX_ERROR_CHARS = 4000


def _listen(addresses: list[tuple[str, int]], hand_over: socket.socket) -> None:
    """Opens loopback listeners here and gives them to the host, which accepts on them from outside."""
    listeners = []
    for address, port in addresses:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
        listeners.append(listener)
    if listeners:
        socket.send_fds(hand_over, [b"!"], [listener.fileno() for listener in listeners])
    for listener in listeners:
        listener.close()


def _wipe() -> None:
    """Empties the scratch folder, however deep or locked its folders are, without ever following a link."""
    names = _FreshNames()
    while entries := os.listdir(SCRATCH):
        for entry in entries:
            path = f"{SCRATCH}/{entry}"
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                # Moving upwards instead of descending: depth costs no recursion.
                inside = f"{path}/{inner}"
                if stat.S_ISDIR(os.lstat(inside).st_mode):
                    os.chmod(inside, 0o700)  # A folder can be moved only by those who may write into it.
                    os.rename(inside, f"{SCRATCH}/{next(names)}.wiped")
                else:
                    os.unlink(inside)
            os.rmdir(path)


class _FreshNames:
    """Names that no job has taken."""

    def __init__(self) -> None:
        self.number = 0

    def __next__(self) -> str:
        while True:
            self.number += 1
            if not os.path.lexists(f"{SCRATCH}/{self.number}.wiped"):
                return str(self.number)


def _serve_once(control: socket.socket, limits: dict[str, Any], header: dict[str, Any], started: Any) -> None:
    job, blobs = wire.receive(control, header["max_job_bytes"])
    baseline = usage.resident_bytes(os.getpid()) if job["kind"] == "python" else 0
    reply, contents = Manager(control, limits, baseline_bytes=baseline).run(job, blobs, started)
    wire.send(control, reply, contents)


def _fork_manager(control: socket.socket, limits: dict[str, Any], boot: dict[str, Any]) -> bool:
    """One job in a fork; false where this sandbox should not be used again."""
    manager = os.fork()
    if manager == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            _serve_once(control, limits, boot, None)
            status = 0
        except (EOFError, OSError):
            status = 2  # The host has gone.
        finally:
            os._exit(status)
    watch = select.poll()
    manager_fd = os.pidfd_open(manager)
    watch.register(manager_fd, select.POLLIN)
    watch.register(control, select.POLLHUP | select.POLLRDHUP)
    ready = {fd for fd, _ in watch.poll()}
    if manager_fd not in ready:
        os._exit(3)  # The host has gone; with this process everything ends.
    os.close(manager_fd)
    status = os.waitpid(manager, 0)[1]
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    if status != 0:
        return False
    _wipe()
    return True


def main(control_fd: int, hand_over_fd: int) -> NoReturn:
    """Never returns; the exit status tells nobody anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_dumpable(False)
    control = socket.socket(fileno=control_fd)
    try:
        boot, _ = wire.receive(control, 1 << 20)
        limits: dict[str, Any] = boot["limits"]
        sys.path.extend(boot["packages"])
        with socket.socket(fileno=hand_over_fd) as hand_over:
            _listen([(address, port) for address, port in boot["listen"]], hand_over)
        try:
            for name in boot["preload"]:
                importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - told to the host, which raises it there
            lines = "".join(traceback.format_exception_only(error))
            wire.send(control, {"error": lines[:_MAX_ERROR_CHARS]})
            os._exit(1)
        started = spawn(boot["start"], limits) if boot["start"] else None
        gc.collect()
        gc.freeze()
        wire.send(control, {"ready": True})
        if not boot["reusable"]:
            _serve_once(control, limits, boot, started)
            os._exit(0)
        waiting = select.poll()
        waiting.register(control, select.POLLIN | select.POLLRDHUP)
        while True:
            if any(events & ~select.POLLIN for _, events in waiting.poll()):
                os._exit(0)
            if not _fork_manager(control, limits, boot):
                os._exit(4)
            wire.send(control, {"idle": True})
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(2)  # The host has gone.
