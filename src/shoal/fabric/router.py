"""A router: a public relay through which the nodes of any run reach each other, all of them dialling out.

    coordinator ──▶ router ◀── worker          it forwards by key; it is given no ticket, grant or secret of a run

It is a Zenoh router with a certificate of its own identity, and nothing else: what it forwards is signed, and sealed
where it says something (`fabric.sealing`), by those who talk. What it learns is in docs/security.md.

Invariants: TLS always, on loopback too; it never dials; what it forwards is bounded by Zenoh's queues, each message
by `MAX_MESSAGE_BYTES`; with the same identity it is the same router after a restart, and nodes come back by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import zenoh

from shoal import PROTOCOL_VERSION
from shoal.errors import ConfigError
from shoal.fabric.endpoint import advertised, is_loopback, reachable_addresses, resolve
from shoal.fabric.identity import Identity
from shoal.fabric.session import LEASE_S, open_listener
from shoal.fabric.ticket import MAX_ENDPOINTS, RouterAddress
from shoal.fabric.traffic import Traffic, TrafficMeter

CLOSE_DEADLINE_S = 3.0


class Router:
    """An open router. Made by `open`; an async context manager that closes itself."""

    def __init__(self, session: zenoh.Session, address: RouterAddress, port: int) -> None:
        self._session = session
        self._meter = TrafficMeter(port)
        self.address = address
        """Its line, encoded, is what runs are told."""
        self.port = port

    @classmethod
    async def open(
        cls, identity: Identity, host: str = "0.0.0.0", port: int = 7447, advertise: Sequence[str] = ()
    ) -> Router:
        """Begin to relay.

        Args:
            advertise: further addresses for the line, such as the public one of a machine behind NAT.

        Raises:
            NetworkError: the host is unknown or the port is taken.
            ConfigError: something advertised is no address.
        """
        bound = await asyncio.to_thread(resolve, host)
        session, port = await asyncio.to_thread(open_listener, identity, "tls", bound, port, LEASE_S)
        found = reachable_addresses(bound)
        public = [address for address in found if not is_loopback(address)] or found
        own = [f"tls/{f'[{a}]' if ':' in a else a}:{port}" for a in public]
        try:
            endpoints = advertised(advertise, own)
        except ValueError as error:
            raise ConfigError(f"--advertise: {error}.", "Write a host, or host:port.") from None
        hosts = tuple(endpoint.partition("/")[2] for endpoint in endpoints[:MAX_ENDPOINTS])
        return cls(session, RouterAddress(PROTOCOL_VERSION, identity.public_key, hosts), port)

    async def num_clients(self) -> int:
        """Nodes connected now; one that is in two runs counts twice."""
        return await asyncio.to_thread(lambda: len(self._session.info.transports()))

    def traffic(self) -> Traffic | None:
        """What its connections have carried so far, where the system tells."""
        return self._meter.read()

    async def close(self) -> None:
        """Stop relaying."""
        async with asyncio.timeout(CLOSE_DEADLINE_S):
            await asyncio.to_thread(self._session.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
