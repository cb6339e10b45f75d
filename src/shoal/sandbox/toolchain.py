"""Where the interpreters are on this machine, and which of their files a sandbox must show.

Invariant: a sandbox sees an interpreter, its standard library and the system's shared libraries; no folder of
programs, no `site-packages`, and no path of the host by its name there.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PYTHON = "/python/bin/python3"
DENO = "/deno/deno"

MIN_BWRAP = (0, 7)
"""The first version whose tmpfs can be given a size."""

_VERSION_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Mount:
    """A file or folder of the host, shown read-only."""

    source: Path
    inside: str


def library_mounts() -> list[Mount]:
    """The system's shared libraries and the loader's cache."""
    triplet = f"{platform.machine()}-linux-gnu"
    folders = [f"/lib/{triplet}", f"/usr/lib/{triplet}", "/lib64", "/usr/lib64"]
    if not os.path.isdir(f"/lib/{triplet}") and not os.path.isdir("/lib64"):
        folders = ["/lib", "/usr/lib"]
    found = [Mount(Path(folder).resolve(), folder) for folder in folders if os.path.isdir(folder)]
    cache = Path("/etc/ld.so.cache")
    return [*found, Mount(cache, str(cache))] if cache.exists() else found


def python_mounts() -> tuple[list[Mount], list[str]]:
    """This interpreter under `/python`, and the folders that must be hidden again."""
    executable = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix)
    mounts = [Mount(executable, PYTHON)]
    if prefix in (Path("/usr"), Path("/usr/local")):
        folders = {sysconfig.get_path(name, vars={"base": str(prefix)}) for name in ("stdlib", "platstdlib")}
        folders = {folder for folder in folders if folder.startswith(f"{prefix}/")}
        for folder in sorted(folders):
            mounts.append(Mount(Path(folder), f"/python/{Path(folder).relative_to(prefix)}"))
        mounts += [Mount(path.resolve(), f"/python/lib/{path.name}") for path in prefix.glob("lib/libpython3*.so*")]
    else:
        # A distribution of its own (pyenv, uv, conda): its libraries are found beside the standard library.
        mounts.append(Mount(prefix / "lib", "/python/lib"))
    hidden = [
        f"/python/lib/{version}/{folder}"
        for folder in ("site-packages", "dist-packages")
        if (prefix / "lib" / version / folder).is_dir()
    ]
    return mounts, hidden


def find_bwrap() -> str | None:
    return shutil.which("bwrap")


def find_deno() -> str | None:
    """Beside this interpreter, where the `deno` wheel puts it, or on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "deno"
    return str(beside.resolve()) if os.access(beside, os.X_OK) else shutil.which("deno")


@functools.lru_cache(maxsize=8)
def program_version(program: str) -> tuple[int, ...]:
    """The first dotted number that `program --version` prints; empty where there is none."""
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, timeout=_VERSION_TIMEOUT_S, check=False, env={}
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(rb"(\d+)\.(\d+)(?:\.(\d+))?", answer.stdout)
    return tuple(int(part) for part in match.groups() if part is not None) if match else ()
