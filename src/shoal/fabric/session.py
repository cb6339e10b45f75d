"""Opening Zenoh sessions: the settings every node uses, and failures told in words.

Zenoh reports an address that nobody listens on, a wrong certificate and a cut cable alike, as a time-out. So a
connection is tried first with plain sockets (`find_reachable`): that failure has a name. The check that protects is
Zenoh's own; the trial only explains.

Invariants: no multicast scouting and no gossip (a node speaks to the listeners in its ticket and to nobody else it
happens to hear); no shared memory with peers; a silent link is given up after `LEASE_S`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

import zenoh

from shoal.errors import NetworkError
from shoal.fabric.core import MAX_MESSAGE_BYTES
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.identity import Identity
from shoal.fabric.tls import connector_config, listener_config, probe_context

LEASE_S = 2.0
"""A peer silent for this long is gone (Zenoh's default of 10 s finds a cut cable in 7.8 s, this in 2.0)."""

HANDSHAKE_S = 5.0
"""A handshake that takes longer is given up and begun anew; a few round trips are enough for one."""

RETRY_S, MAX_RETRY_S = 0.2, 1.0
"""A lost link is dialled again after the one, then after twice as long up to the other."""

PROBE_RETRY_S = 0.2
PORT_ATTEMPTS = 5
"""A free port found by binding may be taken by another before Zenoh binds it; then the next one is tried."""


def open_listener(
    identity: Identity, scheme: str, address: str, port: int, lease_s: float
) -> tuple[zenoh.Session, int]:
    """A session that others connect to and that relays between them, and the port it got. Blocks.

    Raises:
        NetworkError: the port is taken or the address is not this machine's.
    """
    settings = _settings("router", lease_s) | (listener_config(identity) if scheme == "tls" else {})
    for attempt in range(PORT_ATTEMPTS):
        chosen = port or _free_port(address)
        host = f"[{address}]" if ":" in address else address
        try:
            return zenoh.open(_config(settings | {"listen/endpoints": [f"{scheme}/{host}:{chosen}"]})), chosen
        except zenoh.ZError as error:
            if "os error 98" in str(error) or "in use" in str(error):
                if port or attempt == PORT_ATTEMPTS - 1:
                    raise NetworkError(
                        f"port {chosen} on {address} is taken by another program.",
                        "Choose another port, or 0 for any free one.",
                    ) from error
            else:
                raise _cannot_listen(address, chosen, str(error)) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def open_connector(public_key: bytes, endpoint: Endpoint, timeout_s: float, lease_s: float) -> zenoh.Session:
    """A session connected to the listener that owns `public_key`. Blocks for at most about `timeout_s`.

    Raises:
        NetworkError: something answers there, but not as a Shoal node.
    """
    settings = _settings("client", lease_s) | {
        "connect/endpoints": [str(endpoint)],
        "connect/timeout_ms": max(1, int(timeout_s * 1000)),
        "connect/exit_on_failure": True,
    }
    if endpoint.scheme == "tls":
        settings |= connector_config(public_key)
    try:
        return zenoh.open(_config(settings))
    except zenoh.ZError as error:
        raise NetworkError(
            f"{endpoint} accepts connections but does not answer as a Shoal node.",
            "Check that what the ticket names still runs there.",
        ) from error


async def find_reachable(endpoints: Sequence[Endpoint], public_key: bytes, deadline_s: float) -> Endpoint:
    """The first of `endpoints` that answers, with the expected certificate where it is TLS.

    Raises:
        NetworkError: none did before the deadline; the message says of each why not.
    """
    deadline = time.monotonic() + deadline_s
    tasks = [asyncio.create_task(_probe(endpoint, public_key, deadline)) for endpoint in endpoints]
    try:
        reasons = []
        for task in asyncio.as_completed(tasks):
            try:
                return await task
            except NetworkError as error:
                reasons.append(error)
    finally:
        for unfinished in tasks:
            unfinished.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise NetworkError(" ".join(dict.fromkeys(r.problem for r in reasons)), reasons[0].remedy)


async def _probe(endpoint: Endpoint, public_key: bytes, deadline: float) -> Endpoint:
    context = probe_context(public_key) if endpoint.scheme == "tls" else None
    reason = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(remaining):
                _, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
            writer.transport.abort()
            return endpoint
        except ssl.SSLCertVerificationError:
            raise NetworkError(
                f"{endpoint} shows a certificate that is not the ticket's.",
                "Ask for a fresh ticket; if it still fails, somebody else answers at this address.",
            ) from None
        except ssl.SSLError:
            raise NetworkError(
                f"{endpoint} does not speak TLS as a Shoal node does.", "Check the address and port in the ticket."
            ) from None
        except TimeoutError:
            reason = "no answer"
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
        await asyncio.sleep(min(PROBE_RETRY_S, max(0.0, deadline - time.monotonic())))
    raise NetworkError(
        f"{endpoint} cannot be reached: {reason}.",
        "Check that it runs and that no firewall stands between.",
    )


def _settings(mode: str, lease_s: float) -> dict[str, Any]:
    return {
        "mode": mode,
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,
        "scouting/delay": 0,
        "connect/retry": {
            "period_init_ms": int(RETRY_S * 1000),
            "period_max_ms": int(MAX_RETRY_S * 1000),
            "period_increase_factor": 2,
        },
        "listen/endpoints": [],
        "transport/link/tx/lease": int(lease_s * 1000),
        "transport/link/rx/max_message_size": MAX_MESSAGE_BYTES,
        # A link that takes nothing for as long as the lease is as good as silent.
        "transport/link/tx/queue/congestion_control/block/wait_before_close": int(lease_s * 1e6),
        "transport/unicast/open_timeout": int(HANDSHAKE_S * 1000),
        "transport/unicast/accept_timeout": int(HANDSHAKE_S * 1000),
        "transport/shared_memory/enabled": False,
        "adminspace/enabled": False,
    }


def _config(settings: dict[str, Any]) -> zenoh.Config:
    config = zenoh.Config()
    for key, value in settings.items():
        config.insert_json5(key, json.dumps(value))
    return config


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise _cannot_listen(address, 0, error.strerror or str(error)) from error


def _cannot_listen(address: str, port: int, reason: str) -> NetworkError:
    reason = reason.split(" at /")[0]  # Zenoh appends the source line.
    return NetworkError(
        f"cannot listen on port {port} of {address}: {reason}.",
        "Give an address of this machine (127.0.0.1 for itself, 0.0.0.0 for all) and a port above 1023.",
    )
