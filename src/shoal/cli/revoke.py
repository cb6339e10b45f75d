"""`shoal revoke`: take back what nodes of a run were granted, or an invitation."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from cyclopts import Parameter

from shoal.cli.output import console, print_json
from shoal.cli.owner import ask_as_owner, open_run, standing_ticket
from shoal.cli.parameters import Json
from shoal.cli.worker import read_ticket
from shoal.coordinator.admission import Admission
from shoal.errors import ConfigError
from shoal.fabric.join import invitation_of
from shoal.fabric.ticket import Ticket
from shoal.protocol.node import RevokeReply, RevokeRequest


def run(
    where: str,
    /,
    *nodes: str,
    ticket: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    json: Json = False,
) -> None:
    """Take back what nodes of a run were granted, or tickets.

    A revoked node loses its leases at once and never joins this run again under its key. A ticket that is taken back
    admits nobody any more; nodes that joined with it stay until their grants end, a day at most.

    For example:

        shoal revoke runs/arithmetic-20260101-120000 3f9a0c6be1d27a54
        shoal revoke arithmetic-20260101-120000 attic --ticket shoal1AbC...

    Args:
        where: The run's folder, or its name below `runs`.
        nodes: Ids of nodes, or, while the run goes on, their names.
        ticket: A ticket to take back, or a file that holds it; may be given several times.
    """
    if not nodes and not ticket:
        raise ConfigError("nothing to take back was named.", "Name nodes by their ids, or tickets with --ticket.")
    folder = open_run(where)
    found = [Ticket.decode(read_ticket(text)) for text in ticket]
    asked = RevokeRequest(nodes=nodes, invitations=tuple(invitation_of(each.secret) for each in found))

    def offline(admission: Admission) -> RevokeReply:
        return admission.revoke(asked, {}, time.time()).reply

    reply, _ = asyncio.run(ask_as_owner(folder, standing_ticket(folder), "revoke", asked, RevokeReply, offline))
    if json:
        print_json(
            {
                "nodes": list(reply.nodes),
                "tickets": reply.num_invitations,
                "admitted": list(reply.admitted),
                "open_tickets": reply.open_invitations,
            }
        )
        return
    out = console()
    for node_id in reply.nodes:
        out.print(f"node {node_id} is revoked", markup=False)
    if reply.open_invitations:
        out.print(
            "A ticket with which they joined still admits others: whoever holds it can join again under a new key, "
            "until it is taken back with --ticket.",
            markup=False,
        )
    if reply.num_invitations:
        out.print(f"tickets taken back: {reply.num_invitations}", markup=False)
    if reply.admitted:
        out.print(f"joined with them, and still here: {', '.join(reply.admitted)}", markup=False)
