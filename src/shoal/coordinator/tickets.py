"""The tickets that lie in a run's folder, made anew at each start.

    ticket.txt       the standing one, which people use: many uses, an end     (`[network] ticket_uses`, `ticket_hours`)
    own-ticket.txt   for the run's own processes, whatever becomes of the standing one
    secrets.json     their secrets, and the port the run had

Invariants: all are mode 0600; a resumed run keeps its standing ticket while that still admits somebody, and its port
where it can, so that tickets given out stay valid.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from msgspec.structs import replace

from shoal.config import Config
from shoal.coordinator.admission import Admission
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError
from shoal.fabric.endpoint import advertised
from shoal.fabric.fabric import Fabric
from shoal.fabric.join import invitation_of
from shoal.fabric.ticket import Ticket
from shoal.protocol.roster import SwarmRole

TICKET, OWN_TICKET, SECRETS = "ticket.txt", "own-ticket.txt", "secrets.json"

STANDING_ROLES: tuple[SwarmRole, ...] = ("worker", "observer")
"""What the ticket that a run prints admits; for other roles there is `shoal ticket`."""

OWN_ROLES: tuple[SwarmRole, ...] = ("learner", "worker")
OWN_LIFE_S = 365 * 86400.0


def kept_port(run: RunDir) -> int:
    """The port that the run had before, 0 for none."""
    return int(_kept(run).get("port", 0))


def write_tickets(config: Config, run: RunDir, fabric: Fabric, admission: Admission) -> str:
    """Write the run's tickets, and give the standing one.

    Raises:
        ConfigError: an address to advertise is none.
        StorageError: they cannot be written.
    """
    kept, now, network = _kept(run), time.time(), config.network
    standing = bytes.fromhex(kept.get("secret", ""))
    if not admission.invites.is_open(standing, now):
        life_s = network.ticket_hours * 3600
        standing = admission.invite(STANDING_ROLES, now, life_s=life_s, uses=network.ticket_uses).secret
    admission.withdraw(invitation_of(bytes.fromhex(kept.get("own_secret", ""))))
    own = admission.invite(OWN_ROLES, now, life_s=OWN_LIFE_S, uses=config.workers.count + 1).secret
    port = int(fabric.endpoints[0].rpartition(":")[2])
    kept |= {"secret": standing.hex(), "own_secret": own.hex(), "port": port}
    run.write_atomic(SECRETS, json.dumps(kept).encode(), mode=0o600)
    run.write_atomic(OWN_TICKET, f"{_ticket(config, run, fabric, own).encode()}\n".encode(), mode=0o600)
    ticket = _ticket(config, run, fabric, standing).elsewhere().encode()
    run.write_atomic(TICKET, f"{ticket}\n".encode(), mode=0o600)
    return ticket


def _ticket(config: Config, run: RunDir, fabric: Fabric, secret: bytes) -> Ticket:
    """A ticket of the run, advertised addresses first."""
    ticket = fabric.ticket(run.name, secret)
    try:
        return replace(ticket, endpoints=advertised(config.network.advertise, ticket.endpoints))
    except ValueError as error:
        raise ConfigError(f"network.advertise: {error}.", "Write a host, or host:port.") from None


def _kept(run: RunDir) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run.path / SECRETS).read_text()))
    return {}
