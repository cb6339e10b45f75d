"""The short life between us and bubblewrap: a process of its own that gives up what it has, then becomes `bwrap`.

Run as a script by the interpreter alone (`-I -S`), with the number of a file descriptor that holds a JSON object:
`argv`, `parent`, `sources` and `stage` (see `stage`), `uid` and `cgroup`.

Invariant: it ends with its parent, and `bwrap` never starts with more than what was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import NoReturn

STAGES = ("/mnt", "/media", "/tmp")
"""The first of these that exists is covered by a small file system in the launcher's own mount namespace; the host's
folder is not touched."""

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    if libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def stage(place: str, sources: list[str]) -> None:
    """Shows `sources[i]` as `place/i`, to this process and those it becomes or starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace of its own")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # Opened before the stage covers anything that a source may lie under.
    opened = [os.open(source, os.O_PATH) for source in sources]
    folders = [os.path.isdir(source) for source in sources]
    _mount("stage", place, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    for number, (fd, folder) in enumerate(zip(opened, folders, strict=True)):
        target = f"{place}/{number}"
        if folder:
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o444))
        _mount(f"/proc/self/fd/{fd}", target, None, _MS_BIND | _MS_REC)
        os.close(fd)


def main(spec_fd: int) -> NoReturn:
    with os.fdopen(spec_fd, "rb") as file:
        spec = json.load(file)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != spec["parent"]:
        sys.exit("the parent has gone")
    # When memory runs out all the same, the kernel shall take the sandbox and not us.
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    if spec["cgroup"]:
        # The kernel may refuse to move us there; the supervisor's own limits hold all the same.
        with contextlib.suppress(OSError), open(f"{spec['cgroup']}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")
    if spec["stage"]:
        stage(spec["stage"], spec["sources"])
    if spec["uid"] is not None:
        os.setgroups([])
        os.setresgid(spec["uid"], spec["uid"], spec["uid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    os.chdir("/")
    os.execve(spec["argv"][0], spec["argv"], {})


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except OSError as problem:
        sys.exit(f"launcher: {problem}")
