"""`shoal console`: pages about runs, agents, memories and a server; and the same beside `shoal train` and `serve`."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from shoal.cli.output import console as terminal
from shoal.cli.output import note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError, RunError, StorageError

if TYPE_CHECKING:
    from shoal.cli.reach import Target
    from shoal.cli.training import Beside, Session
    from shoal.protocol.status import RunStatus
    from shoal.serving.console.app import Console
    from shoal.serving.console.asked import Server
    from shoal.serving.console.door import Door
    from shoal.serving.console.house import House, Watched
    from shoal.serving.console.voices import Voices
    from shoal.serving.keys import Keys

PORT = 8900
KEY_VARIABLE = "SHOAL_API_KEY"
LOOPBACK = "127.0.0.1"
DRAFTERS = ("ngram",)
"""Needs nothing but the model."""


def run(
    *targets: Annotated[str, Parameter(help="Runs' folders or names, tickets of runs, or one server's address.")],
    host: str = LOOPBACK,
    port: int = PORT,
    key: str = "",
    agents: Path | None = None,
    memory: Path | None = None,
    keys: Path | None = None,
    new_key: str | None = None,
    json: Json = False,
) -> None:
    """Show runs, agents, memories or a server in a browser, until Ctrl-C.

    Without a target the newest run below runs/ is shown, if there is one. `shoal train --console` and `shoal serve`
    have the same pages, below /console.

    For example:

        shoal console
        shoal console runs/NAME runs/OTHER --port 8901
        shoal console http://127.0.0.1:8000
        shoal console --new-key alice

    Args:
        host: Address to listen on; beyond loopback a key is needed.
        port: Port to listen on; 0 takes a free one.
        key: API key of the server that is shown; SHOAL_API_KEY says it as well, and shows it to nobody.
        agents: The log of agents' runs; by default the one under the user's data directory.
        memory: The folder of memories; by default the one there.
        keys: File of the hashes of keys that are let in; by default one under the user's data directory.
        new_key: Make a key of this name, print it once, keep its hash in the file, and leave.
    """
    from shoal.serving import keys as keys_module

    path = keys or _keys_file()
    if new_key is not None:
        made = keys_module.add(path, new_key)
        if json:
            print_json({"name": new_key, "key": made, "file": str(path)})
            return
        note(f"kept as a hash in {path}; this is the only time that the key itself is shown:")
        terminal().print(made, soft_wrap=True, markup=False)
        return
    house = _house(targets, key or os.environ.get(KEY_VARIABLE, ""), agents, memory)
    asyncio.run(_serve(house, _door(path, host), host, port, json))


async def _serve(house: House, door: Door, host: str, port: int, as_json: bool) -> None:
    from shoal.serving.console.hosting import hosted, listening

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    async with hosted(house, door, listening(host, port)) as url:
        if as_json:
            print_json({"url": url, "runs": list(house.runs)})
        else:
            note(f"the console is at {url}; {_lock(door)}; Ctrl-C ends")
        await over.wait()


def _house(targets: tuple[str, ...], key: str, agents: Path | None, memory: Path | None) -> House:
    """What the targets name.

    Raises:
        RunError, TicketError: one names nothing.
        ConfigError: there are two servers, or two runs of one name.
    """
    from shoal.cli.reach import find_target
    from shoal.fabric.identity import data_dir
    from shoal.serving.console.agents import AgentLog
    from shoal.serving.console.asked import Server
    from shoal.serving.console.house import House
    from shoal.serving.console.memories import Memories

    urls = [target for target in targets if target.startswith(("http://", "https://"))]
    if len(urls) > 1:
        raise ConfigError("one server at a time is shown.", "Start another console with another --port.")
    server = Server(urls[0].rstrip("/").removesuffix("/v1"), key) if urls else None
    names = [target for target in targets if target not in urls]
    found = [find_target(name) for name in names]
    if not targets:
        try:
            found = [find_target("")]
        except RunError:
            note("there is no run here; agents and memories are shown")
    watched = [_watched(target) for target in found]
    if len({run.name for run in watched}) < len(watched):
        raise ConfigError("two of the runs have one name.", "Show one of them.")
    folders = {run.name: run.folder.path for run in watched if run.folder is not None}
    return House(
        watched,
        agents=AgentLog(agents or data_dir() / "agents" / "runs.db"),
        memories=Memories(memory or data_dir() / "memory"),
        server=server,
        voices=_voices(folders, server),
    )


def _voices(folders: dict[str, Path], server: Server | None) -> Voices:
    from shoal.serving.console.voices import Voices

    return Voices(folders, server, drafters=DRAFTERS if folders else ())


def _watched(target: Target) -> Watched:
    """A run, whose coordinator is reached whenever its process runs."""
    from shoal.cli.reach import reaching, running_process
    from shoal.serving.console.asked import Ask, Coordinator
    from shoal.serving.console.house import Watched
    from shoal.serving.console.runs import RunFolder

    @asynccontextmanager
    async def reach() -> AsyncIterator[Ask]:
        if target.folder is not None and running_process(target.folder) is None:
            raise RunError(f"run '{target.name}' is not running.")
        async with reaching(target) as reached:
            yield reached.status

    folder = RunFolder(target.folder) if target.folder is not None else None
    return Watched(target.name, folder, Coordinator(reach))


def beside_run(host: str, port: int) -> Beside:
    """What shows a run while it goes on, in the process that runs it; to be made before anything starts.

    Raises:
        ConfigError: everybody on the network could read it.
        NetworkError: it can't listen there.
    """
    from shoal.serving.console.hosting import listening

    door, bound = _door(_keys_file(), host), listening(host, port, "--console-port")

    @asynccontextmanager
    async def beside(session: Session) -> AsyncIterator[None]:
        from shoal.serving.console.asked import Ask, Coordinator
        from shoal.serving.console.hosting import hosted
        from shoal.serving.console.house import House, Watched
        from shoal.serving.console.runs import RunFolder

        async def ask() -> RunStatus:
            return session.coordinator.watch.status()

        @asynccontextmanager
        async def reach() -> AsyncIterator[Ask]:
            yield ask

        name, path = session.run.name, session.run.path
        house = House([Watched(name, RunFolder(path), Coordinator(reach))], voices=_voices({name: path}, None))
        async with hosted(house, door, bound) as url:
            note(f"the console is at {url}; {_lock(door)}")
            yield

    return beside


def beside_server(keys: Keys, host: str) -> tuple[Console, Keys, Callable[[int], None]]:
    """The console of a server, in its own process.

    It asks the server over loopback, as any client does, with a key of its own where keys are asked for. Gives the
    keys with that one, and what to call with the port once the server listens.
    """
    from shoal.config import is_loopback
    from shoal.serving.console.app import Console
    from shoal.serving.console.asked import Server
    from shoal.serving.console.door import Door
    from shoal.serving.console.house import House
    from shoal.serving.keys import Keys, digest

    own = secrets.token_urlsafe(32) if keys.names else ""
    admitted = Keys(keys.names | {digest(own): "the console"}) if own else keys
    server = Server("", own)
    house = House(server=server, voices=_voices({}, server))

    def listens(port: int) -> None:
        near = host if is_loopback(host) and ":" not in host else LOOPBACK
        server.url = f"http://{near}:{port}"

    # The console's own key opens no page.
    return Console(house, Door(keys, _secret(), host)), admitted, listens


def _door(path: Path, host: str) -> Door:
    """Who is let in; raises `ConfigError` where everybody on the network would be."""
    from shoal.config import is_loopback
    from shoal.serving.console.door import Door
    from shoal.serving.keys import load

    keys = load(path)
    if not keys.names and not is_loopback(host):
        raise ConfigError(
            f"on {host} everybody who can reach this machine could read the console.",
            "Make a key with shoal console --new-key NAME, or listen on 127.0.0.1.",
        )
    return Door(keys, _secret(), host)


def _secret() -> bytes:
    """What sessions are signed with; where it can't be kept, they end with this process."""
    from shoal.fabric.identity import data_dir
    from shoal.serving.console.door import SECRET_BYTES, kept_secret

    try:
        return kept_secret(data_dir() / "console" / "secret")
    except StorageError as error:
        note(f"sessions of the console will end with this process: {error}")
        return secrets.token_bytes(SECRET_BYTES)


def _keys_file() -> Path:
    from shoal.fabric.identity import data_dir

    return data_dir() / "console" / "keys"


def _lock(door: Door) -> str:
    return "it asks for a key" if door.asks else "no key is asked for"
