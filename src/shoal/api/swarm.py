"""Who takes part in a run or a collective: looked at, invited, taken back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shoal.api._background import wait
from shoal.errors import RunError

if TYPE_CHECKING:
    from shoal.cli.reach import Reached
    from shoal.protocol.roster import SwarmRole
    from shoal.protocol.status import NodeView, RunStatus

T = TypeVar("T")


class Swarm:
    """The nodes around one coordinator. Each question is asked anew; nothing stays connected.

    Examples:
        ```python
        import shoal

        swarm = shoal.Swarm()  # of the newest run below runs/; or a run's folder or name, or a ticket
        for node in swarm.nodes():
            print(node.name, node.role, node.state, node.version)
        print(swarm.invite(uses=2, hours=12))  # a ticket for `shoal worker`
        ```
    """

    def __init__(self, target: str | Path = "") -> None:
        """
        Args:
            target: a run's folder, its name below `runs`, a ticket, or a file that holds one; empty: the newest run.

        Raises:
            RunError, TicketError: there is no such run, or it is no ticket.
        """
        from shoal.cli.reach import find_target

        self._target = find_target(str(target))

    @property
    def name(self) -> str:
        """The run's name."""
        return self._target.name

    def status(self) -> RunStatus:
        """How the run is, and everybody in it.

        Raises:
            RunError, NetworkError: nobody runs it, or the coordinator does not answer.
        """
        return self._ask(lambda reached: reached.status())

    def nodes(self) -> list[NodeView]:
        """Everybody who takes part, or did until a moment ago."""
        return list(self.status().nodes)

    def logs(self, node: str, lines: int = 100) -> list[str]:
        """What a node said last.

        Args:
            node: its name or id, as `nodes` gives them.
            lines: at most so many.
        """
        from shoal.protocol.status import LogRequest

        async def asked(reached: Reached) -> list[str]:
            known = {name: one for one in (await reached.status()).nodes for name in (one.name, one.node_id)}
            if node not in known:
                raise RunError(f"there is no node {node!r} in run {self.name}.", "See nodes() for their names.")
            return [line.text for line in (await reached.logs(known[node], LogRequest(limit=lines))).lines]

        return self._ask(asked)

    def invite(self, roles: Sequence[SwarmRole] = ("worker",), *, uses: int = 1, hours: float = 24.0) -> str:
        """A ticket that admits nodes; for the run's owner, on the machine that has its folder.

        Args:
            roles: what nodes may join as.
            uses: how many may.
            hours: for how long.
        """
        from shoal.cli.owner import open_run
        from shoal.cli.ticket import another_ticket
        from shoal.protocol.node import TicketRequest

        if self._target.folder is None:
            raise RunError("a ticket's bearer invites nobody.", "Invite on the machine that has the run's folder.")
        asked = TicketRequest(roles=tuple(roles), uses=uses, life_s=hours * 3600)
        asked.check()
        line, _, _ = wait(another_ticket(open_run(str(self._target.folder)), asked))
        return line

    def _ask(self, question: Callable[[Reached], Awaitable[T]]) -> T:
        from shoal.cli.reach import reaching

        async def asked() -> T:
            async with reaching(self._target) as reached:
                return await question(reached)

        return wait(asked())
