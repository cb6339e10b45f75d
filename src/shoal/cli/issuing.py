"""Who lets agents into a collective: a door, a listener, and nothing that the collective needs once they are in.

    run/join ──▶ Admission ──▶ grant for a day          run/leave, run/status

Invariants: it holds no problem, plan or result; when it is gone, those inside go on over routers, and only joining and
renewing wait for it; with its folder it comes back as the same one, and old tickets stay valid.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shoal.coordinator.admission import Admission
from shoal.coordinator.rundir import RunDir
from shoal.errors import NetworkError, StorageError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.join import MAX_JOIN_BYTES, REASONS, read_join_request
from shoal.fabric.service import Request
from shoal.fabric.ticket import RouterAddress, Ticket
from shoal.protocol.codec import encode
from shoal.protocol.node import JoinReply
from shoal.protocol.roster import SwarmRole
from shoal.protocol.status import NodeView, RunStatus, clipped
from shoal.protocol.work import Ack
from shoal.swarm.member import Member, profile

ROLES: tuple[SwarmRole, ...] = ("agent", "observer")
SECRETS, TICKET = "secrets.json", "ticket.txt"
ROUTERS_S = 5.0
"""How long routers may take to answer before the ticket is given all the same."""

MAX_SMALL_BYTES = max(4096, MAX_JOIN_BYTES)


@dataclass
class Issuer:
    """An open door."""

    fabric: Fabric
    admission: Admission
    member: Member
    run: str
    ticket: Ticket
    desk: Desk
    joined: dict[str, str] = field(default_factory=dict)
    """Node id -> name."""

    async def serve(self) -> None:
        """Begin to let in."""
        serve, granted = self.fabric.serve, self.member.is_granted
        await serve("run/join", self._join, max_bytes=MAX_SMALL_BYTES, backlog=256)
        await serve("run/leave", self._leave, max_bytes=MAX_SMALL_BYTES, allow=granted)
        await serve("run/status", self._tell, max_bytes=MAX_SMALL_BYTES, allow=granted)

    async def _join(self, request: Request) -> bytes:
        asked = read_join_request(request.body)
        now = time.time()
        code = asked if isinstance(asked, str) else self.admission.admit(asked, request.sender_key, now)
        if code is not None or isinstance(asked, str):
            assert code is not None
            return encode(JoinReply(accepted=False, code=code, reason=REASONS[code]))
        if asked.role == "agent":
            self.joined[request.sender] = asked.name
        reply = JoinReply(
            accepted=True,
            node_id=request.sender,
            learner_key=self.admission.learner_key,
            grants=self.admission.grants_for(request.sender_key, now),
            revocations=self.admission.grants.revocations,
        )
        return encode(reply)

    async def _leave(self, request: Request) -> bytes:
        self.joined.pop(request.sender, None)
        return encode(Ack())

    async def _tell(self, request: Request) -> bytes:
        here = {node_id_of(node.record.public_key): node.record for node in self.member.nodes("agent")}
        nodes = [
            NodeView(
                node_id=node_id,
                name=clipped(record.name),
                role="agent",
                state="active",
                why=clipped(record.skills),
                public_key=record.public_key,
                device=record.device,
            )
            for node_id, record in here.items()
        ]
        nodes += [
            NodeView(node_id=node_id, name=clipped(name), role="agent", state="lost")
            for node_id, name in self.joined.items()
            if node_id not in here
        ]
        status = RunStatus(
            run=self.run,
            step=0,
            steps=0,
            published=0,
            max_staleness=0,
            most_stale=0,
            groups={},
            usd_per_hour=0.0,
            coordinator=self.desk.status(),
            nodes=tuple(nodes),
            silent=(),
            mode="serving",
        )
        return encode(status)


@asynccontextmanager
async def issuing(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    routers: Sequence[str] = (),
    uses: int = 1024,
    hours: float = 24.0 * 30,
) -> AsyncIterator[Issuer]:
    """A collective's door, while inside.

    Args:
        folder: keys, invitations and the ticket; the same folder is the same collective.
        routers: lines of routers, or files that hold them.

    Raises:
        RunError: another process keeps this door.
        NetworkError, StorageError, TicketError: it cannot be opened.
    """
    run = RunDir(folder)
    try:
        run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}.", "Name another folder.") from None
    async with AsyncExitStack() as stack:
        stack.callback(run.close)
        run.lock()
        kept = _kept(run)
        identity = Identity.load_or_create(run.path / "identity")
        relays = [RouterAddress.find(line) for line in routers]
        fabric = await stack.enter_async_context(await _listen(identity, host, port, _port_of(kept), relays))
        await fabric.unconnected(ROUTERS_S if relays else 0.0)
        # Nothing is trained here: the issuer itself stands where a run's learner would.
        admission = Admission(run, identity, identity.public_key)
        now = time.time()
        secret = bytes.fromhex(str(kept.get("secret", "")))
        if not admission.invites.is_open(secret, now):
            secret = admission.invite(ROLES, now, life_s=hours * 3600, uses=uses).secret
        ticket = fabric.ticket(run.name, secret).elsewhere()
        bound = int(fabric.endpoints[0].rpartition(":")[2])
        run.write_atomic(SECRETS, json.dumps({"secret": secret.hex(), "port": bound}).encode(), mode=0o600)
        run.write_atomic(TICKET, f"{ticket.encode()}\n".encode(), mode=0o600)
        own = profile(fabric, run.name, (), name="issuer")
        member = Member(fabric, run.name, identity.public_key, own, grants=admission.grants)
        await stack.enter_async_context(member)
        desk = Desk(fabric, "issuer", "coordinator", lambda: Account(doing="lets agents in"), member.is_granted)
        await stack.enter_async_context(desk)
        issuer = Issuer(fabric, admission, member, run.name, ticket, desk)
        await issuer.serve()
        yield issuer


async def _listen(identity: Identity, host: str, port: int, before: int, routers: Sequence[RouterAddress]) -> Fabric:
    """Listen; where no port is asked for, on the one it had before, so that old tickets stay valid."""
    if not port and before:
        try:
            return await Fabric.listen(identity, host, before, routers=routers)
        except NetworkError:
            pass  # it is taken: agents elsewhere need the new ticket
    return await Fabric.listen(identity, host, port, routers=routers)


def _port_of(kept: dict[str, object]) -> int:
    """The port in what was kept; 0 for none."""
    port = kept.get("port", 0)
    return port if isinstance(port, int) else 0


def _kept(run: RunDir) -> dict[str, object]:
    path = run.path / SECRETS
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        raise StorageError(f"{path} is damaged.", "Delete it: agents then need a new ticket.") from None
