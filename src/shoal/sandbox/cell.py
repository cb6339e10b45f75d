"""One running sandbox: a bubblewrap process, the connection to the supervisor inside, and its relays.

    host process ── launcher ── becomes ──▶ bwrap ── first process inside ──▶ warden ── job

Invariants: when this process ends, however it ends, so does everything inside (the supervisor sees the connection
close, and the kernel kills bubblewrap with its parent); a job that overruns its time by `GRACE_S` because its
supervisor does not answer is killed from here; nothing from inside is believed beyond its type and size.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.sandbox import cgroup, launcher, privileges
from shoal.sandbox.availability import explain_failure, require
from shoal.sandbox.errors import SandboxError
from shoal.sandbox.guest import wire
from shoal.sandbox.job import DenoRuntime, Job, Limits, PythonRuntime, Reason, Result, Setup
from shoal.sandbox.relay import RelayPort
from shoal.sandbox.room import Room, addresses, bwrap_arguments, deno_command, furnish, job_frame
from shoal.sandbox.seccomp import build_filter

START_TIMEOUT_S = 120.0
"""From the launch until everything is preloaded; large packages take seconds, on a busy machine tens of them."""

GRACE_S = 5.0
END_TIMEOUT_S = 10.0
_MAX_STARTUP_TEXT = 8192


class _Reply(msgspec.Struct, forbid_unknown_fields=True):
    exit_code: int
    reason: Reason
    stdout_truncated: bool
    stderr_truncated: bool
    seconds: float
    cpu_s: float
    peak_memory: int
    files: list[str]
    files_truncated: bool
    blobs: list[int]


def _data_fd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def check_shown(source: Path, *, by_others: bool) -> None:
    """Raises `SandboxError` where `source` is missing or, `by_others`, is not readable by every user."""
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise SandboxError(
            f"{source} does not exist or cannot be reached ({error.strerror}).",
            "A sandbox can show only what is there.",
        ) from None
    wanted = 0o5 if stat.S_ISDIR(mode) else 0o4
    if by_others and mode & wanted != wanted:
        raise SandboxError(
            f"{source} is not readable by every user, and root's sandboxes do not run as root.",
            f"Run `chmod o+rX {source}`, or give a copy.",
        )


class Cell:
    """Use `start`, then `run` once, or several times where it is `reusable`, then `close`."""

    def __init__(self, setup: Setup, limits: Limits, *, reusable: bool) -> None:
        self.setup = setup
        self.limits = limits
        self.reusable = reusable and isinstance(setup.runtime, PythonRuntime)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._relays: list[RelayPort] = []
        self._cgroup: cgroup.Cgroup | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, setup: Setup, limits: Limits, *, reusable: bool = False) -> Cell:
        """A sandbox with everything preloaded and no job yet.

        Raises:
            SandboxUnavailable: the machine lacks what is needed.
            SandboxError: something of the setup is missing, or a module cannot be preloaded.
        """
        cell = cls(setup, limits, reusable=reusable)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await cell._start()
        except TimeoutError:
            await cell.close()
            raise SandboxError(
                f"A sandbox was not ready within {START_TIMEOUT_S:.0f} s.",
                "Preload less, or start fewer sandboxes at once.",
            ) from None
        except BaseException:
            await cell.close()
            raise
        return cell

    async def _start(self) -> None:
        programs = await require(deno=isinstance(self.setup.runtime, DenoRuntime))
        room = furnish(self.setup, programs.deno)
        rights = privileges.choose()
        for mount in room.mounts:
            check_shown(mount.source, by_others=rights.uid is not None)
        ours, theirs = socket.socketpair()
        ours_fds, theirs_fds = socket.socketpair()
        opened: list[int] = []
        try:
            files = {}
            for inside, content in room.data.items():
                files[inside] = _data_fd("room", content)
                opened.append(files[inside])
            opened.append(seccomp_fd := _data_fd("filter", build_filter()))
            spec = self._launch_spec(
                rights, programs.bwrap, room, files, seccomp_fd, (theirs.fileno(), theirs_fds.fileno())
            )
            opened.append(spec_fd := _data_fd("spec", json.dumps(spec).encode()))
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", launcher.__file__, str(spec_fd),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                pass_fds=[*opened, theirs.fileno(), theirs_fds.fileno()], start_new_session=True, env={}, cwd="/",
            )  # fmt: skip
        except BaseException:
            ours.close()
            ours_fds.close()
            raise
        finally:
            for fd in opened:
                os.close(fd)
            theirs.close()
            theirs_fds.close()
        with ours_fds:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
            await self._boot()
            await self._open_relays(ours_fds)

    def _launch_spec(
        self,
        rights: privileges.Privileges,
        bwrap: str,
        room: Room,
        files: dict[str, int],
        seccomp_fd: int,
        supervisor_fds: tuple[int, int],
    ) -> dict[str, object]:
        sources = [mount.source for mount in room.mounts]
        stage = next((place for place in launcher.STAGES if os.path.isdir(place)), None) if rights.stage else None
        places = {source: f"{stage}/{number}" if stage else str(source) for number, source in enumerate(sources)}
        arguments = bwrap_arguments(room, self.limits, shown_as=places.__getitem__, fds=files, seccomp_fd=seccomp_fd)
        parent = cgroup.parent_group()
        self._cgroup = cgroup.create(parent, self.limits) if parent else None
        return {
            "argv": [bwrap, *arguments, *map(str, supervisor_fds)],
            "parent": os.getpid(),
            "sources": [str(source) for source in sources],
            "stage": stage,
            "uid": rights.uid,
            "cgroup": str(self._cgroup.folder) if self._cgroup else None,
        }

    async def _boot(self) -> None:
        inside = addresses(self.setup)
        runtime = self.setup.runtime
        python = runtime if isinstance(runtime, PythonRuntime) else PythonRuntime()
        boot = {
            "limits": msgspec.to_builtins(self.limits),
            "packages": [f"/python/packages/{number}" for number in range(len(python.packages))],
            "preload": list(python.preload),
            "listen": [[inside[relay.name], relay.port] for relay in self.setup.relays],
            "start": deno_command(self.setup, self.limits) if isinstance(runtime, DenoRuntime) else None,
            "reusable": self.reusable,
            "max_job_bytes": self.limits.scratch_bytes + (64 << 20),
        }
        try:
            await self._send(boot, [])
            answer, _ = await self._receive(0)
        except (EOFError, ConnectionError):
            raise explain_failure(await self._last_words()) from None
        if answer.get("ready") is not True:
            problem = str(answer.get("error", "no reason given")).strip()
            raise SandboxError(
                f"A module cannot be preloaded in the sandbox: {problem}.",
                "Name the folder that holds it in `packages`, and check that it imports there.",
            )

    async def _last_words(self) -> str:
        assert self._process is not None and self._process.stderr is not None
        words = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                words = await self._process.stderr.read(_MAX_STARTUP_TEXT)
        return words.decode("utf-8", "replace").strip()

    async def _open_relays(self, hand_over: socket.socket) -> None:
        if not self.setup.relays:
            return
        hand_over.setblocking(False)
        # The supervisor sent them before it said that it is ready, so they are there.
        _, fds, _, _ = socket.recv_fds(hand_over, 1, len(self.setup.relays), socket.MSG_CMSG_CLOEXEC)
        listeners = [socket.socket(fileno=fd) for fd in fds]
        if len(listeners) != len(self.setup.relays):
            for listener in listeners:
                listener.close()
            raise SandboxError(
                "The sandbox did not open all its relays.", "Give each relay a name and port of its own."
            )
        for relay, listener in zip(self.setup.relays, listeners, strict=True):
            port = RelayPort(relay, listener)
            self._relays.append(port)
            await port.open()

    async def _send(self, header: dict[str, Any], blobs: Sequence[bytes]) -> None:
        assert self._writer is not None
        for piece in wire.pack(header, blobs):
            self._writer.write(piece)
        await self._writer.drain()

    async def _receive(self, max_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
        assert self._reader is not None
        header_bytes, body_bytes = wire.PREFIX.unpack(await self._reader.readexactly(wire.PREFIX.size))
        if header_bytes > wire.MAX_HEADER_BYTES or body_bytes > max_bytes:
            raise ValueError("a frame is larger than it may be")
        header = msgspec.json.decode(await self._reader.readexactly(header_bytes), type=dict[str, Any])
        return header, wire.split(header, await self._reader.readexactly(body_bytes))

    async def run(self, job: Job) -> Result:
        """Does one job. A sandbox that is not `reusable`, or that died, is of no use afterwards."""
        header, blobs = job_frame(self.setup, job)
        begun = time.monotonic()
        limits = self.limits
        reason: Reason = "killed"
        words = ""
        try:
            async with asyncio.timeout(limits.wall_s + GRACE_S):
                await self._send(header, blobs)
                answer, contents = await self._receive(2 * limits.output_bytes + limits.scratch_bytes)
            reply = msgspec.convert(answer, _Reply)
            if len(contents) != 2 + len(reply.files) or not set(reply.files) <= set(job.collect):
                raise ValueError("a reply holds what nobody asked for")
            return Result(
                exit_code=reply.exit_code, stdout=contents[0], stderr=contents[1], reason=reply.reason,
                stdout_truncated=reply.stdout_truncated, stderr_truncated=reply.stderr_truncated,
                seconds=reply.seconds, cpu_s=reply.cpu_s, peak_memory=reply.peak_memory,
                files=dict(zip(reply.files, contents[2:], strict=True)), files_truncated=reply.files_truncated,
            )  # fmt: skip
        except TimeoutError:
            reason = "time"
        except (EOFError, ConnectionError, ValueError, msgspec.MsgspecError):
            # The supervisor died with the job, or something else answered in its place: the job is to blame.
            if self._cgroup and self._cgroup.ran_out_of_memory():
                reason = "memory"
            words = await self._last_words()
        except BaseException:
            await self.close()
            raise
        await self.close()
        return Result(
            exit_code=None, stdout=b"", stderr=words.encode(),
            stdout_truncated=True, stderr_truncated=True, reason=reason,
            seconds=time.monotonic() - begun, cpu_s=0.0, peak_memory=0, files={}, files_truncated=bool(job.collect),
        )  # fmt: skip

    async def idle(self) -> bool:
        """After a job: whether everything was cleaned up, so that the next job can come."""
        if not self.reusable or self._closing is not None:
            return False
        for relay in self._relays:
            await relay.drop_connections()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                answer, _ = await self._receive(0)
        except (EOFError, ConnectionError, TimeoutError, ValueError, msgspec.MsgspecError):
            return False
        return answer.get("idle") is True

    async def close(self) -> None:
        """Ends everything inside. Whoever calls again, or is cancelled while waiting, leaves the first call at work."""
        if self._closing is None:
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGKILL)
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for relay in self._relays:
            await relay.close()
        if self._writer is not None:
            self._writer.transport.abort()
        if self._process is not None:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.communicate()
        if self._cgroup is not None:
            self._cgroup.remove()
