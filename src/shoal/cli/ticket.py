"""`shoal ticket`: another invitation to a run, from the machine that has the run's folder."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from cyclopts import Parameter
from msgspec.structs import replace

from shoal.cli.output import console, note, print_json
from shoal.cli.owner import ask_as_owner, open_run, standing_ticket
from shoal.cli.parameters import Json
from shoal.coordinator.admission import Admission
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError
from shoal.protocol.node import TicketReply, TicketRequest
from shoal.protocol.roster import MAX_USES, SwarmRole

MAX_HOURS = 24 * 365.0


def run(
    where: str,
    /,
    *,
    role: Annotated[tuple[SwarmRole, ...], Parameter(negative="")] = ("worker",),
    uses: int = 1,
    hours: float = 24.0,
    json: Json = False,
) -> None:
    """Make another ticket for a run.

    A ticket admits as many nodes as it has uses, until its end; a node that has joined may come back with it. The run
    may be going on, or be continued later. A ticket is a secret: whoever has it may join.

    For example:

        shoal ticket runs/arithmetic-20260101-120000
        shoal ticket arithmetic-20260101-120000 --role observer --uses 5 --hours 2

    Args:
        where: The run's folder, or its name below `runs`.
        role: What nodes may join as; may be given several times.
        uses: How many nodes may join with it.
        hours: How long nodes may join with it.
    """
    if "learner" in role:
        raise ConfigError("only the run's own learner may be its learner.", "Choose another --role.")
    if not 1 <= uses <= MAX_USES or not 0 < hours <= MAX_HOURS:
        raise ConfigError(
            f"a ticket has 1 to {MAX_USES} uses and lasts up to {MAX_HOURS:.0f} hours.", "Change --uses or --hours."
        )
    asked = TicketRequest(roles=role, uses=uses, life_s=hours * 3600)
    line, expires_at, is_running = asyncio.run(another_ticket(open_run(where), asked))
    if json:
        print_json({"ticket": line, "roles": list(role), "uses": uses, "expires_at": expires_at})
        return
    if not is_running:
        note("the run is not going on; the ticket admits once it is continued")
    console().print(line, soft_wrap=True, markup=False)


async def another_ticket(folder: RunDir, asked: TicketRequest) -> tuple[str, float, bool]:
    """The line to hand out, when it expires, and whether the run goes on.

    Raises:
        RunError: the run never started, or its coordinator says no.
        NetworkError: it does not answer.
    """
    standing = standing_ticket(folder)

    def offline(admission: Admission) -> TicketReply:
        invite = admission.invite(asked.roles, time.time(), life_s=asked.life_s, uses=asked.uses)
        return TicketReply(secret=invite.secret, expires_at=invite.expires_at)

    reply, is_running = await ask_as_owner(folder, standing, "ticket", asked, TicketReply, offline)
    return replace(standing, secret=reply.secret).encode(), reply.expires_at, is_running
