"""`shoal agent host`: open a collective, so that agents can join it by ticket."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError

MAX_HOURS = 24 * 365.0


def run(
    name: str = "collective",
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    routers: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    uses: int = 1024,
    hours: float = 24.0 * 30,
    folder: Path | None = None,
    json: Json = False,
) -> None:
    """Open a collective and print the ticket with which agents join it, until Ctrl-C or SIGTERM.

    It admits agents, and those that cannot reach each other talk through it. It takes no part in what they solve: where
    there are routers, they go on when it is gone.

    For example:

        shoal agent host
        shoal agent host --host 0.0.0.0 --routers shoalr1AbC... --routers shoalr1XyZ...
        shoal agent join shoal1AbC... --name sums --lora loras/sums --skills "sums of numbers"

    Args:
        name: The collective's name; the same name is the same collective again, and old tickets stay valid.
        host: Address to listen on; beyond loopback everything is encrypted.
        port: Port to listen on; 0 takes the one it had before, or a free one.
        routers: Lines that `shoal router` printed, or files that hold them; may be given several times.
        uses: How many agents may join with the ticket.
        hours: How long agents may join with it.
        folder: Where its keys and invitations lie; by default under the user's data directory.
    """
    if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise ConfigError(f"{name!r} is no name of a collective.", "Use letters, digits, '.', '_' and '-'.")
    if not 1 <= uses <= 4096 or not 0 < hours <= MAX_HOURS:
        raise ConfigError(f"a ticket has 1 to 4096 uses and lasts up to {MAX_HOURS:.0f} hours.")
    asyncio.run(_host(name, folder, json, host=host, port=port, routers=routers, uses=uses, hours=hours))


async def _host(
    name: str,
    folder: Path | None,
    as_json: bool,
    *,
    host: str,
    port: int,
    routers: tuple[str, ...],
    uses: int,
    hours: float,
) -> None:
    from shoal.cli.issuing import issuing
    from shoal.fabric.identity import data_dir

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    where = folder or data_dir() / "collectives" / name
    async with issuing(where, host=host, port=port, routers=routers, uses=uses, hours=hours) as issuer:
        line = issuer.ticket.encode()
        for router, why in (await issuer.fabric.unconnected()).items():
            note(f"{router} is not connected yet and will be tried again: {why}")
        if as_json:
            print_json({"run": issuer.run, "ticket": line, "node_id": issuer.fabric.identity.node_id})
        else:
            note(f"collective {issuer.run} is open; agents join with shoal agent join, and shoal solve asks them:")
            console().print(line, soft_wrap=True, markup=False)
        await stopping.wait()
    note(f"collective {name}: nobody is let in any more")
