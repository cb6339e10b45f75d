"""What a run's owner asks of its coordinator: with the coordinator's own key, which lies in the run's folder.

A run that is not going on is changed in its folder, under its lock, so that neither way can come between the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shoal.cli.worker import read_ticket
from shoal.coordinator.admission import Admission
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.tickets import OWN_TICKET
from shoal.errors import NetworkError, RunError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import Record, decode, encode

CONNECT_S = 5.0
ASK_S = 10.0

R = TypeVar("R", bound=Record)


def open_run(where: str) -> RunDir:
    """An existing run, by its folder or by its name below `runs`."""
    path = Path(where)
    return RunDir.open(path if (path / "config.toml").exists() else Path("runs") / where)


def standing_ticket(run: RunDir) -> Ticket:
    """A ticket that names the run's addresses, as its last start wrote it.

    Raises:
        RunError: it never started.
    """
    path = run.path / "ticket.txt"
    if not path.exists():
        raise RunError(f"the run in {run.path} has not started yet.", "Start it, then ask again.")
    return Ticket.decode(read_ticket(str(path)))


async def ask_as_owner(
    run: RunDir,
    standing: Ticket,
    verb: str,
    message: Record,
    kind: type[R],
    offline: Callable[[Admission], R],
) -> tuple[R, bool]:
    """The coordinator's answer, or `offline`'s where the run is not going on; and whether it is.

    Raises:
        RunError: the coordinator says no.
        NetworkError: it does not answer.
    """
    try:
        run.lock()
    except RunError:
        pass  # another process runs it, and will answer
    else:
        try:
            return offline(Admission.of(run)), False
        finally:
            run.close()
    root = Admission.of(run).root
    near = Ticket.decode(read_ticket(str(run.path / OWN_TICKET)))
    try:
        async with await Fabric.connect(root, near, CONNECT_S) as fabric:
            data = await fabric.request(f"run/{verb}", encode(message), ASK_S, to=standing.coordinator_key)
    except RemoteError as error:
        raise RunError(error.problem, error.remedy) from error
    except NetworkError as error:
        raise NetworkError(
            f"the run in {run.path} goes on, but its coordinator does not answer: {error.problem}",
            "See `shoal status`; if it was only just started, try again in a moment.",
        ) from error
    return decode(data, kind), True
