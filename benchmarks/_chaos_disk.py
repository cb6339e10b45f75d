"""A disk for each node: an ext4 image that can be filled, made read-only, and slowed down. Needs root.

All of it lies in a mount namespace of the benchmark's own (`own_mounts`), so that no mount outlives it, however it
ends; the loop devices go with the mounts.

    full        a file takes all that is free
    read-only   the same tree is mounted over itself, read-only: what is opened from now on cannot be written, what was
                open before can (a kernel that meets a broken disk refuses those as well)
    slow        the device's reads and writes are held to a rate by the block layer (`blkio`, of cgroup v1)
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
from pathlib import Path

from shoal.errors import RunError

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000

SIZE_BYTES = 96 * 2**20
"""Of each image; sparse."""

BLOCK_BYTES = 2**16

COMMAND_S = 60.0

BLKIO = Path("/sys/fs/cgroup/blkio")
RATES = tuple(BLKIO / f"blkio.throttle.{way}_bps_device" for way in ("read", "write"))


def own_mounts() -> None:
    """What this process and its children mount from now on, nobody else sees.

    Raises:
        RunError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        why = os.strerror(ctypes.get_errno())
        raise RunError(f"a mount namespace cannot be had: {why}.", "Run it as root on Linux.")


def can_slow() -> bool:
    """Whether this machine's block layer can be told a rate."""
    return all(os.access(path, os.W_OK) for path in RATES)


async def command(*argv: str | Path) -> str:
    """What a program printed.

    Raises:
        RunError: it failed.
    """
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(COMMAND_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise RunError(f"{' '.join(map(str, argv))} failed: {said.decode(errors='replace').strip()}")
    return said.decode()


class Disk:
    """One node's disk, mounted at `path` from `open` to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._image = path.with_suffix(".img")
        self._device = ""
        """Its numbers, as the block layer wants them."""
        self._covered = False

    async def open(self) -> None:
        self.path.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        await command("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", self._image)
        await command("mount", "-o", "loop", self._image, self.path)
        device = os.stat(self.path).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"

    async def close(self) -> None:
        """Unmount it, whoever still has files open, and remove it."""
        self.set_rate(0)
        await self.uncover()
        with contextlib.suppress(RunError):  # it was never mounted
            await command("umount", "-l", self.path)
        self._image.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.path / "ballast"

    def fill(self) -> None:
        """Leave no byte."""
        block = bytes(BLOCK_BYTES)
        with self._ballast.open("wb", buffering=0) as file:
            size = len(block)
            while size:
                try:
                    file.write(block[:size])
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    async def cover(self) -> None:
        """Read-only from now on."""
        await command("mount", "--bind", self.path, self.path)
        self._covered = True
        await command("mount", "-o", "remount,bind,ro", self.path)

    async def uncover(self) -> None:
        if self._covered:
            await command("umount", "-l", self.path)
            self._covered = False

    def set_rate(self, bytes_per_s: int) -> None:
        """Hold reads and writes to it; 0 lifts that."""
        if self._device and can_slow():
            for path in RATES:
                path.write_text(f"{self._device} {bytes_per_s}")
