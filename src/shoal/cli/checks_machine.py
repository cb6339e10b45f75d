"""What `shoal doctor` looks at on this machine. Nothing is changed but a file that is written and removed at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import shoal
from shoal.fabric.identity import KEY_FILE, data_dir

State = Literal["ok", "warning", "failed"]

GIB = 2**30
MIN_MEMORY_BYTES = 4 * GIB
"""A worker with the embedded model takes 2, and a learner 6.5; below this not even a worker has room to breathe."""

MIN_FREE_BYTES, LOW_FREE_BYTES = GIB, 5 * GIB
PROBE_BYTES = 32 * 2**20
SLOW_DISK_BYTES_PER_S = 20e6
"""A snapshot of the embedded model takes longer than 13 s to write below this."""

PROGRAM_S = 10.0
MAX_NAMED = 4
MAX_KEYS = 2000

SECRET_FILES = (KEY_FILE, "ticket.txt", "own-ticket.txt", "secrets.json", "invites.json", "revocations.bin")


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def machine_checks() -> Iterator[Check]:
    """All of them, each as soon as it is known."""
    yield _processor()
    yield _memory()
    yield _gpu()
    yield _python()
    yield _packages()
    yield from _disk()
    yield _models()
    yield _keys()
    yield from _sandbox()


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} cores, {platform.machine()}, {platform.system()} {platform.release()}"
    with contextlib.suppress(OSError):
        load = os.getloadavg()[0]
        if load > 2 * cores:
            return Check("processor", "warning", f"{detail}, load {load:.1f}", "Other programs keep it busy; see top.")
    return Check("processor", "ok", detail)


def _memory() -> Check:
    sizes = _meminfo()
    if "MemTotal" not in sizes:
        return Check("memory", "ok", "this system does not say how much there is")
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", 0)
    swap, swap_free = sizes.get("SwapTotal", 0), sizes.get("SwapFree", 0)
    detail = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB available, swap {swap / GIB:.1f} GiB"
    if free < MIN_MEMORY_BYTES:
        return Check("memory", "warning", detail, "Close other programs: a worker takes 2 GiB, a learner 7 GiB.")
    if swap and swap - swap_free > swap / 2:
        return Check("memory", "warning", f"{detail}, more than half of it used", "Close other programs.")
    return Check("memory", "ok", detail)


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}


def _gpu() -> Check:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("GPU", "ok", "no NVIDIA driver; models run on the processor")
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Check("GPU", "warning", "nvidia-smi does not answer", "Restart the driver, or use --device cpu.")
    if asked.returncode != 0:
        said = (asked.stdout + asked.stderr).strip().splitlines()
        return Check("GPU", "warning", said[-1][:200] if said else "nvidia-smi fails", "Install or restart the driver.")
    return Check("GPU", "ok", "; ".join(line.strip() for line in asked.stdout.splitlines()[:MAX_NAMED]))


def _python() -> Check:
    detail = f"Shoal {shoal.__version__} (protocol {shoal.PROTOCOL_VERSION}), Python {platform.python_version()}"
    return Check("Python", "ok", detail)


def _packages() -> Check:
    """Those that Shoal names are there; in the versions that it is tested with, where the list of them is at hand."""
    wanted = _constraints()
    missing = [name for name in _requirements() if _version(name) is None]
    if missing:
        names = " ".join(sorted(missing))
        return Check("packages", "failed", f"missing: {names}", f"pip install {names}")
    installed = {name: _version(name) for name in wanted}
    differing = [f"{n} {have} (tested: {wanted[n]})" for n, have in installed.items() if have not in (None, wanted[n])]
    if differing:
        more = f" and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        remedy = "If something fails: pip install -r constraints.txt, in the project's folder."
        return Check("packages", "warning", ", ".join(differing[:MAX_NAMED]) + more, remedy)
    count = sum(have is not None for have in installed.values())
    return Check("packages", "ok", f"{count} as tested" if wanted else "all there")


def _requirements() -> list[str]:
    try:
        lines = importlib.metadata.requires("shoal") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # run from its sources
    return [re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines if "extra ==" not in line]


def _constraints() -> dict[str, str]:
    path = Path(shoal.__file__).parents[2] / "constraints.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;#+]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk() -> Iterator[Check]:
    home = data_dir()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(home).free
        seconds = _write_probe(home)
    except OSError as error:
        remedy = "Make it writable, or set SHOAL_HOME to a folder that is."
        yield Check("disk", "failed", f"{home} cannot be written: {error.strerror}", remedy)
        return
    detail, remedy = f"{free / GIB:.1f} GiB free in {home}", "Free some space, or set SHOAL_HOME to another disk."
    state: State = "failed" if free < MIN_FREE_BYTES else "warning" if free < LOW_FREE_BYTES else "ok"
    yield Check("disk", state, detail, "" if state == "ok" else remedy)
    speed = PROBE_BYTES / seconds
    slow = speed < SLOW_DISK_BYTES_PER_S
    remedy = "Set SHOAL_HOME to a faster disk: snapshots are written at every step." if slow else ""
    yield Check("disk speed", "warning" if slow else "ok", f"{speed / 1e6:.0f} MB/s written", remedy)


def _write_probe(home: Path) -> float:
    path = home / f".probe.{secrets.token_hex(4)}"
    data = os.urandom(2**20)
    started = time.monotonic()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(PROBE_BYTES // len(data)):
                file.write(data)
            os.fsync(file.fileno())
        return max(1e-6, time.monotonic() - started)
    finally:
        path.unlink(missing_ok=True)


def _models() -> Check:
    cache = data_dir() / "models"
    found = [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []
    if not found:
        return Check("models", "ok", f"none in {cache}; the first run fetches its own")
    size = sum(file.stat().st_size for path in found for file in path.rglob("*") if file.is_file())
    return Check("models", "ok", f"{len(found)} in {cache}, {size / 1e6:.0f} MB")


def _keys() -> Check:
    """Keys and tickets of this user and of the runs in this folder are nobody else's to read."""
    paths: list[Path] = []
    for root in (data_dir(), Path("runs")):
        for pattern in SECRET_FILES:
            paths += list(root.rglob(pattern))[:MAX_KEYS] if root.is_dir() else []
    exposed = [path for path in paths if path.stat().st_mode & 0o077]
    if exposed:
        names = " ".join(str(path) for path in exposed[:MAX_NAMED])
        return Check("keys", "failed", f"{len(exposed)} can be read by other users: {names}", f"chmod 600 {names}")
    return Check("keys", "ok", f"{len(paths)} keys and tickets, readable by you alone")


def _sandbox() -> Iterator[Check]:
    from shoal.sandbox.availability import missing_programs

    found = missing_programs()
    for name, missing in found:
        yield Check(f"sandbox ({name})", "warning", missing.what, missing.remedy)
    if not found:
        yield Check("sandbox", "ok", "bubblewrap and Deno are here")
