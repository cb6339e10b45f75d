"""How a sandbox's inside is built: the arguments that bubblewrap is given for a setup. Pure, but for finding files.

Invariants: everything shown is read-only but the scratch folder, whose size is limited; the root folder and `/dev`
are read-only as well; there is no device but null, full and random (a shared mapping of `/dev/zero` would hold
memory that no limit counts); no host environment, no host network, no capability.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import ConfigError
from shoal.sandbox import guest
from shoal.sandbox.job import SCRATCH, DenoRuntime, Job, Limits, PythonRuntime, Setup
from shoal.sandbox.toolchain import DENO, PYTHON, Mount, library_mounts, python_mounts

NOBODY = 65534

_GUEST = Path(guest.__file__).parent
_GUEST_MODULES = ("wire.py", "usage.py", "child.py", "manager.py", "warden.py")
_START = (
    "import sys; sys.path.insert(0, '/shoal'); from shoal.sandbox.guest.warden import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_DEVICES = ("null", "full", "random", "urandom")
_HEAP_SHARE = 0.75
"""Of the memory limit, for V8's heap: past it V8 gives up by itself, with a message."""

V8_RESERVE_BYTES = 1 << 30
"""Address space that V8 reserves as writable without using it; the kernel's limit on a process is raised by as much,
and what is really used is measured."""

ENVIRONMENT = {
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LD_LIBRARY_PATH": "/python/lib",
    # Numeric libraries start a thread per processor otherwise, and the limit on processes counts threads.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""What the supervisor and Python or native jobs see."""

DENO_ENVIRONMENT = {
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "DENO_DIR": f"{SCRATCH}/.deno",
    "DENO_NO_UPDATE_CHECK": "1",
    "NO_COLOR": "1",
}


@dataclass
class Room:
    """What is to be shown, in order; `data` are small files by their path inside."""

    mounts: list[Mount] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    data: dict[str, bytes] = field(default_factory=dict)


def addresses(setup: Setup) -> dict[str, str]:
    """The loopback address inside for each name that the setup's relays use."""
    found = {"localhost": "127.0.0.1"}
    for relay in setup.relays:
        if re.fullmatch(r"[0-9.]+", relay.name):
            if not relay.name.startswith("127."):
                raise ConfigError(
                    f"{relay.name} cannot be an address inside a sandbox.",
                    "Give the relay a host name or an address that begins with 127; its target may be any address.",
                )
            found[relay.name] = relay.name
        elif relay.name not in found:
            found[relay.name] = f"127.1.0.{len(found)}"
    return found


def furnish(setup: Setup, deno: str | None) -> Room:
    """Collects what the setup's runtime and the caller's own folders need."""
    room = Room(mounts=library_mounts())
    python, room.hidden = python_mounts()
    room.mounts += python
    for name in _GUEST_MODULES:
        room.data[f"/shoal/shoal/sandbox/guest/{name}"] = (_GUEST / name).read_bytes()
    room.data["/etc/passwd"] = f"nobody:x:{NOBODY}:{NOBODY}:nobody:{SCRATCH}:/nonexistent\n".encode()
    room.data["/etc/group"] = f"nogroup:x:{NOBODY}:\n".encode()
    room.data["/etc/nsswitch.conf"] = b"hosts: files\npasswd: files\ngroup: files\n"
    room.data["/etc/resolv.conf"] = b""
    room.data["/etc/hosts"] = "".join(
        f"{address} {name}\n" for name, address in addresses(setup).items() if name != address
    ).encode()
    runtime = setup.runtime
    if isinstance(runtime, PythonRuntime):
        for number, folder in enumerate(runtime.packages):
            room.mounts.append(Mount(folder, f"/python/packages/{number}"))
    elif isinstance(runtime, DenoRuntime):
        assert deno, "the caller has checked"
        room.mounts.append(Mount(Path(deno), DENO))
        room.data["/deno/worker.ts"] = (_GUEST / "worker.ts").read_bytes()
        if runtime.node_modules:
            room.mounts.append(Mount(runtime.node_modules, "/node_modules"))
            room.data["/package.json"] = b"{}"
    room.mounts += [Mount(source, inside) for inside, source in setup.read_only.items()]
    return room


def bwrap_arguments(
    room: Room, limits: Limits, *, shown_as: Callable[[Path], str], fds: dict[str, int], seccomp_fd: int
) -> list[str]:
    """Everything behind `bwrap` up to the supervisor's own two arguments.

    Args:
        shown_as: where the launcher has put a source.
        fds: for each of the room's data files the descriptor that holds it.
    """
    arguments = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    arguments += ["--unshare-cgroup-try", "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    arguments += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    # The kernel's settings belong to root and are not writable anyway; read-only they stay so whoever we are.
    arguments += ["--seccomp", str(seccomp_fd), "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"]
    for device in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for link, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        arguments += ["--symlink", f"/proc/self/fd{target}", f"/dev/{link}"]
    for mount in room.mounts:
        arguments += ["--ro-bind", shown_as(mount.source), mount.inside]
    for folder in room.hidden:
        arguments += ["--size", "4096", "--tmpfs", folder, "--remount-ro", folder]
    for inside, fd in fds.items():
        arguments += ["--ro-bind-data", str(fd), inside]
    arguments += ["--size", str(limits.scratch_bytes), "--tmpfs", SCRATCH, "--symlink", SCRATCH, "/tmp"]
    arguments += ["--remount-ro", "/", "--chdir", SCRATCH]
    return [*arguments, "--", PYTHON, "-I", "-S", "-B", "-c", _START]


def deno_command(setup: Setup, limits: Limits) -> dict[str, object]:
    """The process that a Deno sandbox starts ahead of its job."""
    runtime = setup.runtime
    assert isinstance(runtime, DenoRuntime)
    readable = [SCRATCH, "/deno/worker.ts", "/node_modules", "/package.json", *setup.read_only]
    flags = ["--quiet", "--no-prompt", "--no-remote", "--no-lock", "--no-config"]
    flags += ["--node-modules-dir=manual"] if runtime.node_modules else ["--no-npm"]
    flags += [f"--allow-read={','.join(readable)}", f"--allow-write={SCRATCH}"]
    if setup.relays:
        flags.append(f"--allow-net={','.join(f'{relay.name}:{relay.port}' for relay in setup.relays)}")
    # Its environment is empty anyway; packages that look into it shall find nothing instead of an error.
    flags += ["--ignore-env", "--deny-run", "--deny-ffi", "--deny-sys", "--deny-import"]
    heap_mib = max(16, int(limits.memory_bytes * _HEAP_SHARE) >> 20)
    flags.append(f"--v8-flags=--max-old-space-size={heap_mib}")
    argv = [DENO, "run", *flags, "/deno/worker.ts", json.dumps(runtime.preload)]
    return {"kind": "exec", "argv": argv, "env": DENO_ENVIRONMENT, "reserve_bytes": V8_RESERVE_BYTES}


def job_frame(setup: Setup, job: Job) -> tuple[dict[str, object], list[bytes]]:
    """The job as the supervisor wants it.

    Raises:
        ConfigError: a job that does not fit its setup's runtime.
    """
    files = dict(job.files)
    stdin = job.stdin
    environment = {**ENVIRONMENT, **job.environment}
    if isinstance(setup.runtime, PythonRuntime):
        files["main.py"] = job.source.encode()
        kind, argv = "python", ["main.py", *job.argv]
    elif isinstance(setup.runtime, DenoRuntime):
        files["main.ts"] = job.source.encode()
        kind, argv = "started", []
        stdin = json.dumps({"main": f"file://{SCRATCH}/main.ts", "argv": job.argv}).encode() + b"\n" + stdin
    else:
        kind, argv = "exec", list(job.argv)
        if job.source or not argv or not argv[0].startswith("/"):
            raise ConfigError(
                "A native job is a program's path inside the sandbox and its arguments, without a source.",
                "Give argv, such as ('/input/program', '--flag').",
            )
    if any("\0" in text for text in (*argv, *environment, *environment.values())):
        raise ConfigError("A job's arguments or variables hold a NUL byte.", "Pass binary data as a file or on stdin.")
    header: dict[str, object] = {"kind": kind, "argv": argv, "env": environment, "files": list(files)}
    return {**header, "collect": list(job.collect)}, [stdin, *files.values()]
