"""What a sandbox is asked to do, within which limits, and what came of it.

A `Setup` is what stands in the sandbox before anything untrusted arrives: the runtime, folders to read, addresses to
reach. A `Job` is one piece of untrusted work. Together they are a `Program`. Warm workers are started from a setup
and are given jobs.

Invariant: paths inside a sandbox are absolute and free of `..`; names of a job's files are relative and free of `..`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Literal

from shoal.errors import ConfigError

Reason = Literal["ok", "exit", "time", "memory", "output", "processes", "killed"]
"""Why a job ended. `ok`: exit status 0; `exit`: another one; `killed`: a signal, or its sandbox died under it; the
others name the limit that it broke."""

SCRATCH = "/scratch"
"""The one writable folder; it is the job's working directory, home and temporary directory."""

RESERVED = (
    "/scratch",
    "/proc",
    "/dev",
    "/etc",
    "/python",
    "/deno",
    "/shoal",
    "/node_modules",
    "/lib",
    "/lib64",
    "/usr",
)
"""Where a setup's own folders may not be put."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})")


def _check_inside(name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) != name or name == ".":
        raise ConfigError(f"{name!r} is not a file name inside a sandbox.", "Use a relative path without '..'.")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a job may use. Every limit ends it, with the reason that names the limit.

    `memory_bytes` holds for all processes of the job together, `scratch_bytes` for its files; what the host can
    lose to a job is their sum. For Python the memory is counted beyond what preloaded modules occupy.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    """Processor time of all processes together."""
    memory_bytes: int = 512 << 20
    processes: int = 32
    """Processes and threads together. Deno needs about 20."""
    output_bytes: int = 1 << 20
    """Of standard output, and as much again of standard error."""
    scratch_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 < getattr(self, item.name) < 1 << 48:
                raise ConfigError(f"A sandbox's {item.name} is {getattr(self, item.name)}.", "Give a positive number.")


@dataclass(frozen=True)
class Relay:
    """One address that a sandbox may reach, and the only way out of it.

    Inside, `name:port` is a TCP address on the sandbox's own loopback. The host joins each connection to `target`: a
    host and port, or the path of a unix socket. Ports below 1024 cannot be offered inside.
    """

    name: str
    port: int
    target: tuple[str, int] | Path

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not 1024 <= self.port <= 65535:
            raise ConfigError(
                f"{self.name}:{self.port} cannot be offered inside a sandbox.",
                "Use a plain host name or IPv4 address, and a port from 1024 to 65535.",
            )


@dataclass(frozen=True)
class PythonRuntime:
    """This process's Python version, its standard library, and nothing else.

    Args:
        packages: folders put on `sys.path`, readable inside, such as a `site-packages`.
        preload: modules imported before the first job arrives.
    """

    packages: tuple[Path, ...] = ()
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class DenoRuntime:
    """Deno for TypeScript and JavaScript modules, without remote code, subprocesses, FFI or environment.

    Args:
        node_modules: a folder of npm packages, importable by their bare names.
        preload: specifiers imported before the job arrives.
    """

    node_modules: Path | None = None
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class NativeRuntime:
    """Programs that the setup's `read_only` brings; the system's shared libraries are there."""


Runtime = PythonRuntime | DenoRuntime | NativeRuntime


@dataclass(frozen=True)
class Setup:
    """What stands in a sandbox before untrusted work arrives.

    Args:
        read_only: files and folders of the host by their path inside; they must be readable by everyone.
        relays: addresses that can be reached; without any the sandbox has no network at all.
    """

    runtime: Runtime = field(default_factory=PythonRuntime)
    read_only: Mapping[str, Path] = field(default_factory=dict)
    relays: tuple[Relay, ...] = ()

    def __post_init__(self) -> None:
        for inside in self.read_only:
            path = PurePosixPath(inside)
            reserved = any(inside == taken or inside.startswith(f"{taken}/") for taken in RESERVED)
            if not path.is_absolute() or ".." in path.parts or str(path) != inside or inside == "/" or reserved:
                raise ConfigError(
                    f"A sandbox cannot show a folder as {inside!r}.",
                    f"Use an absolute path without '..' outside {', '.join(RESERVED)}, such as '/input'.",
                )
        if len(self.relays) > 64:
            raise ConfigError(f"A sandbox is given {len(self.relays)} addresses.", "Give at most 64.")


@dataclass(frozen=True)
class Job:
    """One piece of untrusted work.

    Args:
        source: the Python or TypeScript module to run, as `main.py` or `main.ts` in the scratch folder.
        argv: its arguments; for a native program, the program's path inside and its arguments.
        files: written to the scratch folder before it starts.
        collect: files of the scratch folder to bring back; missing ones, links and non-files are left out.
        environment: variables it sees, beside HOME, TMPDIR, PATH and LANG. A Deno job cannot read them.
    """

    source: str = ""
    argv: tuple[str, ...] = ()
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    collect: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.files, *self.collect):
            _check_inside(name)


@dataclass(frozen=True)
class Program:
    """A job and the setup it runs in."""

    job: Job
    setup: Setup = field(default_factory=Setup)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a job. Everything in it was chosen by untrusted code, within the limits.

    `exit_code` is negative for a signal, and None where the sandbox died before it could tell. `peak_memory` in
    bytes is what was seen at 20 to 50 ms intervals or by the kernel, whichever is more.
    """

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    reason: Reason
    seconds: float
    cpu_s: float
    peak_memory: int
    files: Mapping[str, bytes]
    files_truncated: bool
    """Whether a file was left out because all together were larger than `scratch_bytes`."""
