"""`shoal router`: a small public relay, so that a run's machines need only dial out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.output import console, error_console, note, print_json
from shoal.cli.parameters import Json

if TYPE_CHECKING:
    from shoal.fabric.router import Router
    from shoal.fabric.traffic import Traffic

REPORT_S = 60.0
"""How often the router says what it carries."""

METER_S = 2.0
"""How often it looks, so that little of what short connections carried is missed."""


def run(
    *,
    host: str = "0.0.0.0",
    port: int = 7447,
    advertise: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    identity: Path | None = None,
    json: Json = False,
) -> None:
    """Relay between machines that cannot reach each other, until Ctrl-C or SIGTERM.

    It needs no knowledge of the runs that use it and can read neither prompts, episodes nor weights. It prints a line
    to give to `shoal train`; started again with the same identity, it is the same router.

    For example:

        shoal router
        shoal router --port 443 --advertise relay.example.org
        shoal train configs/arithmetic.toml --network.routers shoalr1AbC...

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        advertise: Further addresses at which it can be reached, host or host:port; may be given several times.
        identity: Folder of its key; by default one under the user's data directory.
    """
    asyncio.run(_relay(host, port, advertise, identity, json))


async def _relay(host: str, port: int, advertise: Sequence[str], directory: Path | None, json: bool) -> None:
    from shoal.fabric.identity import Identity, data_dir
    from shoal.fabric.router import Router

    identity = Identity.load_or_create(directory or data_dir() / "router")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with await Router.open(identity, host, port, advertise) as router:
        line = router.address.encode()
        facts: dict[str, Any] = {"line": line, "port": router.port, "hosts": list(router.address.hosts)}
        if json:
            print_json(facts | {"node_id": identity.node_id})
        else:
            note(f"relaying on {', '.join(router.address.hosts)}; runs are told of it with --network.routers and:")
            console().print(line, soft_wrap=True, markup=False)
        await _report(router, stopping)


async def _report(router: Router, stopping: asyncio.Event) -> None:
    """What the router carries: one line kept up to date on a terminal, elsewhere one a minute and one at the end."""
    from rich.live import Live
    from rich.text import Text

    terminal = error_console()
    started = told_at = time.monotonic()
    with Live(console=terminal, auto_refresh=False, transient=True) if terminal.is_terminal else nullcontext() as live:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), METER_S)
            now = time.monotonic()
            text = describe(await router.num_clients(), router.traffic(), now - started)
            if live is not None and not stopping.is_set():
                live.update(Text(text, style="dim"), refresh=True)
            elif now - told_at >= REPORT_S or stopping.is_set():
                terminal.print(text, style="dim", markup=False)
                told_at = now


def describe(num_clients: int, traffic: Traffic | None, seconds: float) -> str:
    """The line."""
    text = f"{num_clients} {'client' if num_clients == 1 else 'clients'}, up {seconds / 60:.0f} min"
    if traffic is not None:
        text += f", {traffic.bytes_received / 1e6:.1f} MB in, {traffic.bytes_sent / 1e6:.1f} MB out"
    return text
