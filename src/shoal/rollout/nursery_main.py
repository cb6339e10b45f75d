"""The process that agent programs are started from: with imports done once, and nothing left behind.

Run by the interpreter of the agent program's command, so it imports the standard library alone. Jobs come as lines of
JSON on standard input (`rollout.nursery` writes them) and answers go out the same way, in any order:

    {"id": 7, "argv": [...], "env": {...}, "cwd": "...", "stdin": "...", "deadline_s": 60, "output_bytes": 65536}
    {"id": 7, "exit": 0, "why": "", "stdout": "...", "stderr": "..."}     why: "", "deadline", "output" or "stopped"
    {"stop": 7}                                                           ends a job early

A Python program is run in a fork of this process, in which the modules to preload are imported already; any other
program is executed. Each job is a session of its own. Invariants: a job ends at its deadline or when it prints too
much; when it has ended, whatever it started is killed, also what left its process group; when standard input ends, so
does everything.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn, TextIO

TAIL_BYTES = 4096
"""Kept of a job's standard error."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

MARK = "SHOAL_AGENT"
"""Variable by which processes that a job started are known, wherever they have got to."""

DRAIN_S = 0.05
"""After a job's end, for output that is on its way."""


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the process group alone holds a job together."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class Job:
    """One running program."""

    def __init__(self, request: dict[str, Any], preloaded: bool) -> None:
        self.id = request["id"]
        self.deadline = time.monotonic() + request["deadline_s"]
        self.limit = request["output_bytes"]
        self.why = ""
        self.stdout, self.stderr = bytearray(), bytearray()
        with tempfile.TemporaryFile() as task:
            task.write(request["stdin"].encode())
            task.seek(0)
            out, out_end = os.pipe()
            err, err_end = os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                become(request, preloaded, task.fileno(), out_end, err_end)
            os.close(out_end)
            os.close(err_end)
        self.pipes = {out: self.stdout, err: self.stderr}
        for fd in self.pipes:
            os.set_blocking(fd, False)

    def read(self, fd: int) -> bool:
        """Take what is there; the end of a pipe closes it."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            os.close(fd)
            del self.pipes[fd]
            return False
        kept = self.pipes[fd]
        kept += data
        if kept is self.stderr:
            del kept[:-TAIL_BYTES]
        elif len(kept) > self.limit:
            del kept[self.limit :]
            self.stop("output")
        return True

    def stop(self, why: str) -> None:
        self.why = self.why or why
        kill(self.pid)

    def ended(self, status: int) -> dict[str, Any]:
        """The answer; the program has been reaped."""
        kill_group(self.pid)
        until = time.monotonic() + DRAIN_S
        for fd in list(self.pipes):
            while fd in self.pipes and self.read(fd):
                if time.monotonic() > until:
                    break
        for fd in self.pipes:
            os.close(fd)
        return {
            "id": self.id,
            "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
            "why": self.why,
            "stdout": self.stdout.decode("utf-8", "replace"),
            "stderr": self.stderr.decode("utf-8", "replace"),
        }


def become(request: dict[str, Any], preloaded: bool, task: int, out: int, err: int) -> NoReturn:
    """In the child: be the program. Never returns."""
    code = 1
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for fd, own in ((task, 0), (out, 1), (err, 2)):
            os.dup2(fd, own)
        os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 65536)
        if request["cwd"]:
            os.chdir(request["cwd"])
        environment = dict(request["env"])
        environment[MARK] = str(request["id"])
        if not preloaded:
            os.execvpe(request["argv"][0], request["argv"], environment)
        os.environ.clear()
        os.environ.update(environment)
        code = run_python(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  whatever ends the program, this process must not live on as a second nursery
        import traceback

        traceback.print_exc()
    finally:
        try:
            import atexit
            import threading

            if hasattr(threading, "_shutdown"):
                threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run_python(argv: list[str]) -> int:
    """`python SCRIPT …` or `python -m MODULE …`, without a new interpreter."""
    import random

    random.seed()
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if argv[1] == "-m":
        sys.argv = argv[2:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[1])))
        runpy.run_path(argv[1], run_name="__main__")
    return 0


def kill(pid: int) -> None:
    """A process that has not been reaped, and its group if it leads one."""
    kill_group(pid)
    with suppress(ProcessLookupError):  # it has not made its session yet
        os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def strays(jobs: Iterable[Job]) -> list[int]:
    """Processes that have come to us because their parent ended, and that belong to no running job."""
    jobs = list(jobs)
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(word) for word in file.read().split()]
    except OSError:
        return []
    alive = {job.pid: job for job in jobs}
    marks = {f"{MARK}={job.id}".encode() for job in jobs}
    found = []
    for pid in children:
        if pid in alive:
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                told = set(file.read().split(b"\0"))
            if not told & marks and os.getsid(pid) not in alive:
                found.append(pid)
        except (OSError, ProcessLookupError):
            continue
    return found


class Nursery:
    """The loop."""

    def __init__(self, preloaded: bool, channel: TextIO) -> None:
        self.preloaded = preloaded
        self.channel = channel
        self.jobs: dict[int, Job] = {}
        self.unread = b""

    def run(self) -> None:
        """Until standard input ends."""
        ready, wake = os.pipe()
        for fd in (ready, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self.answer({"ready": True})
        while True:
            now = time.monotonic()
            for job in self.jobs.values():
                if now >= job.deadline:
                    job.stop("deadline")
            pipes = {fd: job for job in self.jobs.values() for fd in job.pipes}
            next_deadline = min((job.deadline - now for job in self.jobs.values()), default=60.0)
            found, _, _ = select.select([0, ready, *pipes], [], [], max(0.01, next_deadline))
            for fd in found:
                if fd in pipes:
                    pipes[fd].read(fd)
            if ready in found:
                os.read(ready, 4096)
            if 0 in found and not self.take():
                return
            self.reap()

    def take(self) -> bool:
        """Read jobs; false at the end of standard input."""
        data = os.read(0, 1 << 20)
        if not data:
            return False
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "stop" in request:
                job = self.jobs.get(request["stop"])
                if job is not None:
                    job.stop("stopped")
            else:
                self.jobs[request["id"]] = Job(request, self.preloaded)
        return True

    def reap(self) -> None:
        """Answer for the jobs that have ended."""
        by_pid = {job.pid: job for job in self.jobs.values()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = by_pid.get(pid)
            if job is not None:
                del self.jobs[job.id]
                self.answer(job.ended(status))
                for stray in strays(self.jobs.values()):
                    kill(stray)

    def end(self) -> None:
        """Kill whatever is left."""
        for job in self.jobs.values():
            kill(job.pid)
        self.jobs = {}
        until = time.monotonic() + 2.0
        while time.monotonic() < until:  # those that are killed hand us their own children
            for stray in strays(()):
                kill(stray)
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.01)
            except ChildProcessError:
                return

    def answer(self, message: dict[str, Any]) -> None:
        self.channel.write(json.dumps(message) + "\n")
        self.channel.flush()


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    del sys.path[0]  # this file's folder, whose modules are not the agent's business
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    modules = json.loads(sys.argv[1])
    for module in modules:
        __import__(module)
    if modules:
        import gc

        gc.collect()
        gc.freeze()
    nursery = Nursery(bool(modules), channel)
    try:
        nursery.run()
    finally:
        nursery.end()


if __name__ == "__main__":
    main()
