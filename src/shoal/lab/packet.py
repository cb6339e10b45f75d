"""The packet lab: every node a network namespace whose only way out is the switch process. Needs root.

    async with packet_lab(network) as lab:
        server = await lab.run("router", ["shoal", "router", "--listen", lab.address("router")])
        await lab.isolate("router")

What is and is not isolated: IP traffic and abstract Unix sockets are; files, shared memory, pipes and Unix sockets in
the file system are the machine's, shared by all nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

import shoal
from shoal.errors import NetworkError
from shoal.lab import namespaces, tun
from shoal.lab.control import (
    MAX_LINE_BYTES,
    AskStatistics,
    Counted,
    Done,
    Failed,
    Ready,
    Reply,
    Request,
    SetCuts,
    SetUp,
)
from shoal.lab.lab import Lab
from shoal.lab.network import Event, Isolate, Network
from shoal.lab.statistics import Statistics

REPLY_WAIT_S = 30.0
"""The switch answers at once, but a busy machine may not let it."""

SET_UP_WAIT_S = 120.0
"""250 namespaces on a slow machine."""

_number = itertools.count()

R = TypeVar("R", Ready, Done, Counted)


@asynccontextmanager
async def packet_lab(network: Network, *, capture: Path | None = None) -> AsyncIterator[PacketLab]:
    """A running packet lab.

    Args:
        capture: folder into which every node's packets go, as `NODE.pcap`; complete when the lab has ended.

    Raises:
        NetworkError: this machine or user cannot have one; the message says what is missing.
    """
    async with PacketLab(network, capture=capture) as lab:
        yield lab


class PacketLab(Lab):
    """See the module."""

    def __init__(self, network: Network, *, capture: Path | None = None) -> None:
        super().__init__(network)
        self._capture = capture
        start = namespaces.start_ticks(os.getpid())
        self._owner = namespaces.Owner(os.getpid(), start or 0, next(_number))
        self._switch: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()

    def address(self, node: str) -> str:
        """Where the node's own processes can bind: a private address behind a NAT."""
        return self.network.address(node)

    def public_address(self, node: str) -> str:
        """Where others reach the node, if its NAT lets them."""
        return self.network.public_address(node)

    def namespace(self, node: str) -> str:
        """Name of the node's namespace, as `ip netns` lists it."""
        self.network.index(node)
        return self._owner.namespace(node)

    @property
    def switch_pid(self) -> int:
        """Process id of the switch; when it is stopped, so is all traffic."""
        assert self._switch is not None
        return self._switch.pid

    async def statistics(self) -> Statistics:
        """What was counted so far."""
        return (await self._ask(AskStatistics(), Counted, REPLY_WAIT_S)).statistics

    def _command(self, node: str, argv: Sequence[str]) -> list[str]:
        return enter_command(self.namespace(node), argv)

    async def _enforce(self, event: Event) -> None:
        restart = [self.network.index(event.node)] if isinstance(event, Isolate) else []
        await self._ask(SetCuts(self._cuts.pairs(), restart), Done, REPLY_WAIT_S)

    async def _open(self) -> None:
        if problem := tun.missing():
            raise NetworkError(problem, "Use it there, or the proxy lab, which needs nothing.")
        ours, theirs = socket.socketpair()
        with theirs:
            self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
            self._switch = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "shoal.lab.switch_process",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                env=own_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        owner = self._owner
        capture = "" if self._capture is None else str(self._capture.absolute())
        await self._ask(SetUp(self.network, owner.pid, owner.start_ticks, owner.number, capture), Ready, SET_UP_WAIT_S)

    async def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._switch is not None:
            try:
                await asyncio.wait_for(self._switch.wait(), REPLY_WAIT_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._switch.kill()
                await self._switch.wait()
        # A switch that was killed left them.
        await asyncio.to_thread(namespaces.remove, [self._owner.namespace(node.name) for node in self.network.nodes])

    async def _ask(self, request: Request, kind: type[R], wait_s: float) -> R:
        assert self._reader is not None and self._writer is not None
        try:
            async with self._turn, asyncio.timeout(wait_s):
                self._writer.write(msgspec.json.encode(request) + b"\n")
                line = await self._reader.readline()
        except (ConnectionError, TimeoutError):
            line = b""
        if not line:
            raise NetworkError(
                "The lab's switch process does not answer.", "Was it stopped or killed? Its own output says why."
            )
        reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failed):
            raise NetworkError(reply.problem, reply.remedy)
        assert isinstance(reply, kind)
        return reply


def enter_command(namespace: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` in a namespace, as the same process."""
    return ["nsenter", f"--net={namespaces.FOLDER / namespace}", "--", *argv]


def own_environment() -> dict[str, str]:
    """Our environment, for children that import the same sources as we do."""
    source = str(Path(shoal.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
