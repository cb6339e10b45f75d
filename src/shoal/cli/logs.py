"""`shoal logs`: what a node of a run logged, from its file where that lies here, else from the node itself."""

from __future__ import annotations

import asyncio
import json as jsonlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from shoal.cli.output import note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, NetworkError, RunError

if TYPE_CHECKING:
    from shoal.cli.reach import Reached, Target
    from shoal.protocol.status import LogLine, NodeView

FOLLOW_EVERY_S = 0.5
ASK_EVERY_S = 1.0

TAIL_BYTES = 4 * 2**20
"""Read from the end of a file; more lines than fit in it are not shown."""

COORDINATOR = "coordinator"

Print = Callable[[str], None]


def run(
    node: str,
    /,
    *,
    of: Annotated[str, Parameter(name="--run")] = "",
    follow: Flag = False,
    lines: int = 50,
    json: Json = False,
) -> None:
    """Show what a node of a run logged.

    The run's own processes write to files in its folder, which are read also when the run is over; the coordinator's
    log is the run's events. Other nodes are asked for the newest lines that they keep.

    For example:

        shoal logs learner
        shoal logs coordinator --run runs/arithmetic-20260101-120000
        shoal logs attic --run shoal1AbC... --follow

    Args:
        node: Name or id, as `shoal status` shows it.
        of: Folder or name of the run, or a ticket of it; by default the newest run.
        follow: Go on with new lines until the run ends or Ctrl-C; with --json, one object a line.
        lines: Lines to begin with.
    """
    from shoal.cli.reach import find_target
    from shoal.protocol.status import MAX_LINES

    if not 1 <= lines <= MAX_LINES:
        raise ConfigError(f"--lines {lines} is out of range.", f"Ask for 1 to {MAX_LINES} lines.")
    target = find_target(of)
    path = _file_of(target.folder, node) if target.folder is not None else None
    told: list[str] = []

    def tell(line: str) -> None:
        if not json:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        elif follow:
            print_json({"node": node, "line": line})
        else:
            told.append(line)

    if path is not None and target.folder is not None:
        _show_file(path, target.folder, lines, follow, tell)
    else:
        asyncio.run(_show_node(target, node, lines, follow, tell))
    if json and not follow:
        print_json({"node": node, "file": str(path) if path is not None else None, "lines": told})


def _file_of(folder: Path, node: str) -> Path | None:
    """The file that the node, one of the run's own processes, logs to."""
    if node == COORDINATOR:
        return folder / "events.jsonl"
    files = {path.stem: path for path in (folder / "logs").glob("*.log")}
    return files.get(node) or files.get(_name_of(folder, node))


def _name_of(folder: Path, node_id: str) -> str:
    """What the node with this id was called when it joined last."""
    name = ""
    for line in _read(folder / "events.jsonl", 0)[0]:
        if node_id in line and "node.joined" in line:
            try:
                event = jsonlib.loads(line)
                name = str(event["data"]["name"]) if event["node"] == node_id else name
            except (ValueError, TypeError, KeyError):
                continue
    return name


def _show_file(path: Path, folder: Path, num_lines: int, follow: bool, tell: Print) -> None:
    from shoal.cli.reach import running_process

    words = _event_in_words if path.name == "events.jsonl" else str
    found, position = _read(path, 0)
    for line in found[-num_lines:]:
        tell(words(line))
    while follow:
        running = running_process(folder) is not None
        found, position = _read(path, position)
        for line in found:
            tell(words(line))
        if not running:
            return
        time.sleep(FOLLOW_EVERY_S)


def _read(path: Path, position: int) -> tuple[list[str], int]:
    """Whole lines from `position` on, at most the last `TAIL_BYTES`, and where to go on."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < position:
                position = 0  # The file was put aside and begun anew.
            start = max(position, size - TAIL_BYTES)
            file.seek(start)
            data = file.read(size - start)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.", "Ask as the user who started the run.") from None
    if start > position:
        data = data.partition(b"\n")[2]
    whole = data.rfind(b"\n") + 1
    return data[:whole].decode(errors="replace").splitlines(), size - (len(data) - whole)


def _event_in_words(line: str) -> str:
    """One line of `events.jsonl` for people."""
    try:
        event = jsonlib.loads(line)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        data = " ".join(f"{key}={value}" for key, value in event["data"].items())
        return f"{clock} {event['kind']} {event['node']} {data}".rstrip()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return line


async def _show_node(target: Target, name: str, num_lines: int, follow: bool, tell: Print) -> None:
    from shoal.cli.reach import reaching, running_process
    from shoal.protocol.status import LogRequest

    if target.folder is not None and running_process(target.folder) is None:
        raise RunError(
            f"run '{target.name}' is not running, and no log of a node '{name}' lies in its folder.",
            f"Those that do: {', '.join(sorted(path.stem for path in (target.folder / 'logs').glob('*.log')))}.",
        )
    async with reaching(target) as reached:
        node = await find_node(reached, name)
        request, silent = LogRequest(limit=num_lines), False
        while True:
            try:
                reply = await reached.logs(node, request)
            except NetworkError as error:
                if not follow or request.after < 0:
                    raise
                if not silent:
                    note(f"{node.name} does not answer; it is asked on: {error.problem}")
                silent = True
            else:
                silent = False
                if reply.missed:
                    note(f"{reply.missed} lines were no longer kept")
                for line in reply.lines:
                    tell(_in_words(line))
                last = reply.lines[-1].number if reply.lines else max(0, request.after)
                request = LogRequest(after=last, life=reply.life)
            if not follow:
                return
            await asyncio.sleep(ASK_EVERY_S)


async def find_node(reached: Reached, name: str) -> NodeView:
    """The node of the run that `name` means: its name, its id or the beginning of it.

    Raises:
        RunError: there is none, or several.
    """
    from shoal.protocol.status import NodeView

    status = await reached.status()
    own = status.coordinator
    key = reached.coordinator_key
    everyone = [
        NodeView(node_id=own.node_id, name=COORDINATOR, role=COORDINATOR, state="active", public_key=key),
        *(node for node in status.nodes if node.node_id),
    ]
    found = [node for node in everyone if name == node.name] or [
        node for node in everyone if len(name) >= 4 and node.node_id.startswith(name)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(node.node_id for node in found)
        raise RunError(f"run '{status.run}' has {len(found)} nodes '{name}'.", f"Say which by its id: {ids}.")
    names = ", ".join(node.name for node in everyone)
    raise RunError(f"run '{status.run}' has no node '{name}'.", f"Its nodes: {names}.")


def _in_words(line: LogLine) -> str:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(line.time, 2**33)))
    return f"{clock} {line.level:7} {line.text}"
