"""How commands that look at a run find and reach it: as its owner, by the key in its folder, or with a ticket.

    `runs/NAME`, NAME, nothing (the newest run)  ──▶ a folder: the coordinator's own key lies there    owner
    `shoal1…`, or a file that holds it           ──▶ join as an observer, and leave again              guest

Invariants: nothing here waits for longer than its deadlines; a coordinator that is stopped, dead or cut off is said to
be so, and not taken for a slow network; a folder is only read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.coordinator.silence import stopped_process
from shoal.errors import NetworkError, RunError, TicketError
from shoal.fabric.desk import ask_dump, ask_logs
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, data_dir
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import decode
from shoal.protocol.status import MAX_RUN_STATUS_BYTES, Dump, LogReply, LogRequest, NodeView, RunStatus

CONNECT_S = 4.0
ASK_S = 4.0
"""A run that lives answers within milliseconds; both together stay below the ten seconds in which people give up."""

DUMP_S = 10.0
LOGS_S = 6.0

RUNS = Path("runs")
OBSERVER = "observer"


@dataclass(frozen=True)
class Target:
    """What the user named: a run's folder, or a ticket."""

    folder: Path | None
    ticket: Ticket | None = None

    @property
    def name(self) -> str:
        if self.folder is not None:
            return self.folder.name
        assert self.ticket is not None
        return self.ticket.run


def find_target(text: str) -> Target:
    """The run that `text` means; nothing means the newest one.

    Raises:
        RunError, TicketError: there is none.
    """
    if not text:
        return Target(newest_run())
    for path in (Path(text), RUNS / text):
        with contextlib.suppress(OSError):
            if (path / "config.toml").is_file():
                return Target(path.resolve())
    if re.match(r"shoal\d", text) or Path(text).is_file():
        from shoal.cli.worker import read_ticket

        return Target(None, Ticket.decode(read_ticket(text)))
    raise RunError(
        f"there is no run '{text[:100]}' here.", "Give a run's folder, its name below 'runs', or a ticket of it."
    )


def newest_run() -> Path:
    """The folder below `runs` in which something happened last.

    Raises:
        RunError: there is none.
    """
    found = [path.parent for path in RUNS.glob("*/config.toml")]
    if not found:
        raise RunError("there is no run below 'runs'.", "Name a run's folder, or a ticket of it.")

    def last_change(folder: Path) -> float:
        events = folder / "events.jsonl"
        return (events if events.exists() else folder).stat().st_mtime

    return max(found, key=last_change).resolve()


def running_process(folder: Path) -> int | None:
    """Id of the process that runs the run in `folder`, 0 if only that there is one is known; `None`: nobody does."""
    lock = folder / "lock"
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                return max(0, int(fields[4]))
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, by closing
    except BlockingIOError:
        return 0
    except OSError:
        return None
    return None


@dataclass(frozen=True)
class Reached:
    """A connection to a run's coordinator, and what may be asked through it."""

    fabric: Fabric
    coordinator_key: bytes
    target: Target

    async def status(self) -> RunStatus:
        """How the run is.

        Raises:
            NetworkError: the coordinator does not answer; says why where that can be found out.
            RecordError: what it answers is no status.
        """
        try:
            data = await self.fabric.request(
                "run/status", b"", ASK_S, to=self.coordinator_key, max_reply_bytes=MAX_RUN_STATUS_BYTES
            )
        except RemoteError:
            raise
        except NetworkError as error:
            raise unreachable(self.target, error) from error
        return decode(data, RunStatus, max_bytes=MAX_RUN_STATUS_BYTES)

    async def logs(self, node: NodeView, request: LogRequest) -> LogReply:
        """Log lines of a node."""
        return await ask_logs(self.fabric, node.public_key, node.node_id, request, LOGS_S)

    async def dump(self, node: NodeView) -> Dump:
        """What a node does at this moment."""
        return await ask_dump(self.fabric, node.public_key, node.node_id, DUMP_S)


def unreachable(target: Target, error: NetworkError) -> NetworkError:
    """The error for a coordinator that does not answer, with what this machine knows about its process."""
    process = running_process(target.folder) if target.folder is not None else None
    remark = stopped_process(process) if process else ""
    if remark:
        return NetworkError(f"the coordinator of run '{target.name}' does not answer: its {remark}.")
    if process is not None:
        return NetworkError(
            f"the coordinator of run '{target.name}' (process {process}) runs but does not answer: {error.problem}",
            f"It may be overloaded; `shoal logs coordinator --run {target.name}` shows what it did last.",
        )
    return NetworkError(
        f"the coordinator of run '{target.name}' does not answer: {error.problem}",
        "It has ended, is stopped, or cannot be reached from here; try `shoal doctor` with the same ticket.",
    )


@asynccontextmanager
async def reaching(target: Target, connect_s: float = CONNECT_S) -> AsyncIterator[Reached]:
    """Connected to the target's coordinator while inside.

    Raises:
        RunError: nobody runs it.
        NetworkError: it does not answer.
        JoinRefused: the ticket admits no observer.
    """
    ticket, identity = ticket_of(target), _identity_for(target)
    try:
        connecting = await Fabric.connect(identity, ticket, connect_s)
    except NetworkError as error:
        raise unreachable(target, error) from error
    async with connecting as fabric:
        reached = Reached(fabric, ticket.coordinator_key, target)
        if target.folder is not None:
            yield reached
            return
        async with _guest(fabric, ticket, target):
            yield reached


@asynccontextmanager
async def _guest(fabric: Fabric, ticket: Ticket, target: Target) -> AsyncIterator[None]:
    """Admitted as an observer while inside; other nodes hear of the grant."""
    from shoal.rollout.link import taking_part

    try:
        async with taking_part(fabric, ticket, "observer", f"{OBSERVER} on {platform.node()}") as part:
            try:
                yield
            finally:
                with contextlib.suppress(NetworkError):  # It is gone already, and so are we.
                    await part.link.leave()
    except RemoteError:
        raise
    except NetworkError as error:
        raise unreachable(target, error) from error


def ticket_of(target: Target) -> Ticket:
    """The ticket that names the target's addresses.

    Raises:
        RunError, TicketError: there is none yet, or it cannot be read.
    """
    if target.ticket is not None:
        return target.ticket
    assert target.folder is not None
    try:
        return Ticket.decode((target.folder / "ticket.txt").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise RunError(f"run '{target.name}' has not begun to listen yet.", "Ask again in a moment.") from None
    except OSError as error:
        raise TicketError(
            f"the ticket of run '{target.name}' cannot be read: {error.strerror}.",
            "Ask as the user who started the run, or with a ticket.",
        ) from None


def _identity_for(target: Target) -> Identity:
    """The owner's key where the run's folder is at hand, else this user's key as an observer."""
    if target.folder is None:
        return Identity.load_or_create(data_dir() / OBSERVER)
    key = target.folder / "identity" / "coordinator"
    if not os.access(key, os.R_OK | os.X_OK):
        raise RunError(
            f"the key of run '{target.name}' cannot be read.", "Ask as the user who started the run, or with a ticket."
        )
    return Identity.load_or_create(key)
