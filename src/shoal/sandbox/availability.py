"""Whether this machine can run sandboxes, and what to do where it cannot.

Having the programs is not enough: a container or a hardened kernel may forbid user namespaces, so a sandbox is
tried. What the trial said is read here, once, and turned into one sentence on what is wrong and one on what to do.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ShoalError
from shoal.sandbox.errors import SandboxError, SandboxUnavailable
from shoal.sandbox.seccomp import build_filter
from shoal.sandbox.toolchain import MIN_BWRAP, find_bwrap, find_deno, program_version

INSTALL_BWRAP = (
    "Install bubblewrap: `apt-get install bubblewrap` on Debian and Ubuntu, `dnf install bubblewrap` on Fedora, "
    "`pacman -S bubblewrap` on Arch."
)
INSTALL_DENO = "Install Deno into this Python environment: `pip install deno`."

_SYSCTLS = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1",
     "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
)  # fmt: skip
_CONTAINER = (
    "In a container, start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined`; "
)


@dataclass(frozen=True)
class Programs:
    bwrap: str
    deno: str | None


@dataclass(frozen=True)
class Missing:
    """One thing that this machine lacks."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Availability:
    """`python` and `deno`: whether such jobs can run here; `missing` says why not."""

    python: bool
    deno: bool
    missing: tuple[Missing, ...]


def check_bwrap() -> Missing | None:
    program = find_bwrap()
    if program is None:
        return Missing("bubblewrap (`bwrap`) is not installed.", INSTALL_BWRAP)
    version = program_version(program)
    if version < MIN_BWRAP:
        found, wanted = ".".join(map(str, version)) or "unknown", ".".join(map(str, MIN_BWRAP))
        return Missing(f"bubblewrap {found} ({program}) is older than {wanted}.", INSTALL_BWRAP)
    return None


def check_deno() -> Missing | None:
    program = find_deno()
    if program is None:
        return Missing("Deno is not installed.", INSTALL_DENO)
    if not program_version(program):
        return Missing(f"Deno ({program}) does not start.", INSTALL_DENO)
    return None


async def require(*, deno: bool) -> Programs:
    """The programs that a sandbox needs.

    Raises:
        SandboxUnavailable: one is missing.
    """
    for check in (check_bwrap, check_deno) if deno else (check_bwrap,):
        missing = await asyncio.to_thread(check)
        if missing:
            raise SandboxUnavailable(missing.what, missing.remedy)
    bwrap = find_bwrap()
    assert bwrap is not None
    return Programs(bwrap, find_deno() if deno else None)


def explain_failure(words: str) -> ShoalError:
    """The error for a sandbox that ended before it was ready, from what bubblewrap or the launcher said last."""
    said = words.splitlines()[-1] if words else "nothing"
    lowered = words.lower()
    if "can't find source path" in lowered or ("permission denied" in lowered and "uid map" not in lowered):
        return SandboxError(
            f"A sandbox could not be built: {said}.",
            "What it shows must be readable by every user, and so must the folders above it.",
        )
    if "can't mount proc" in lowered:
        return SandboxUnavailable(
            f"This machine does not let a sandbox have its own /proc: {said}.",
            f"{_CONTAINER}or run on the machine itself.",
        )
    if any(word in lowered for word in ("namespace", "uid map", "operation not permitted", "no space left")):
        for path, bad, command in _SYSCTLS:
            if Path(path).exists() and Path(path).read_text(encoding="ascii").strip() == bad:
                return SandboxUnavailable(
                    f"This machine forbids user namespaces ({path} is {bad}).", f"Run `{command}`."
                )
        return SandboxUnavailable(f"This machine forbids user namespaces: {said}.", f"{_CONTAINER}or allow them.")
    return SandboxUnavailable(
        f"A sandbox could not be started: {said}.", f"Try `bwrap --unshare-all --ro-bind / / true` as {_user()}."
    )


def _user() -> str:
    return "root" if os.geteuid() == 0 else f"user {os.geteuid()}"


def missing_programs() -> list[tuple[str, Missing]]:
    """Without trying a sandbox: what lacks, by `bwrap`, `deno` and `processor`."""
    found: list[tuple[str, Missing]] = []
    for name, check in (("bwrap", check_bwrap), ("deno", check_deno)):
        if missing := check():
            found.append((name, missing))
    try:
        build_filter()
    except SandboxUnavailable as error:
        found.append(("processor", Missing(error.problem, error.remedy)))
    return found
