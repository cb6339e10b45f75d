"""The process that becomes the untrusted program: limits first, then the program, and never a return.

Invariants: the child has three file descriptors, its pipes; the environment it was given and no other; and limits
that it cannot raise. A Python job runs in this very fork of the interpreter that was warmed up; anything else is
executed anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import traceback
import types
from dataclasses import dataclass
from typing import Any, NoReturn

SCRATCH = "/scratch"

MEMORY_EXIT_CODE = 125
"""Exit status of a Python job that ended in an uncaught MemoryError."""

OPEN_FILES = 256
SUPERVISORS = 2
"""Processes of ours in the sandbox that the kernel counts with the job's."""
PROCESS_HEADROOM = 2
"""The kernel refuses a fork this far beyond the limit; at the limit itself the supervisor ends the job."""

_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Started:
    """A process whose pipes we hold."""

    pid: int
    stdin: int
    stdout: int
    stderr: int


def set_dumpable(allowed: bool) -> None:
    """Whether other processes of this user may look into this one; not across an exec."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, int(allowed), 0, 0, 0)


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmData")), 0)


def _limit(limits: dict[str, Any], already: int) -> None:
    cpu_s = math.ceil(limits["cpu_s"])
    values = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_DATA: (limits["memory_bytes"] + already,) * 2,
        resource.RLIMIT_NPROC: (limits["processes"] + SUPERVISORS + PROCESS_HEADROOM,) * 2,
        resource.RLIMIT_FSIZE: (limits["scratch_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (OPEN_FILES,) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_SIGPENDING: (256, 256),
    }
    for kind, (soft, hard) in values.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def spawn(header: dict[str, Any], limits: dict[str, Any]) -> Started:
    """Starts what `header` describes: `kind` "python" or "exec", `argv`, `env`, `reserve_bytes`."""
    inputs, outputs, errors = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become(header, limits, inputs[0], outputs[1], errors[1])
        except BaseException:  # noqa: BLE001 - a fork must never return into the supervisor, whatever went wrong
            traceback.print_exc()
        finally:
            os._exit(126)
    for fd in (inputs[0], outputs[1], errors[1]):
        os.close(fd)
    for fd in (inputs[1], outputs[0], errors[0]):
        os.set_blocking(fd, False)
    return Started(pid, inputs[1], outputs[0], errors[0])


def _become(header: dict[str, Any], limits: dict[str, Any], stdin: int, stdout: int, stderr: int) -> NoReturn:
    os.setsid()
    # Nothing of ours may lie on 0 to 2 while they are replaced.
    for target, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, target)
    os.closerange(3, 1 << 16)
    os.chdir(SCRATCH)
    os.umask(0o022)
    environment: dict[str, str] = header["env"]
    argv: list[str] = header["argv"]
    if header["kind"] == "python":
        _limit(limits, _data_bytes())
        set_dumpable(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(_run_python(argv))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    # Last: from here on the interpreter itself may be too large for its limits.
    _limit(limits, header.get("reserve_bytes", 0))
    try:
        os.execve(argv[0], argv, environment)
    except (OSError, ValueError) as error:
        os.write(2, f"{argv[0]}: {error}\n".encode("utf-8", "replace"))
        os._exit(127)


def _run_python(argv: list[str]) -> int:
    """Runs `argv[0]` as `__main__`; returns its exit status."""
    path = f"{SCRATCH}/{argv[0]}"
    sys.argv = [path, *argv[1:]]
    sys.path[:] = [SCRATCH, *(entry for entry in sys.path if entry != "/shoal")]
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    status = 0
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            status = (end.code or 0) & 255
        else:
            print(end.code, file=sys.stderr)
            status = 1
    except MemoryError:
        status = MEMORY_EXIT_CODE
        with contextlib.suppress(MemoryError):
            traceback.print_exc()
    except BaseException as error:  # noqa: BLE001 - whatever it raised is shown on its own standard error
        status = 1
        frames = error.__traceback__ and error.__traceback__.tb_next  # Without this function's own line.
        traceback.print_exception(type(error), error, frames)
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return status
