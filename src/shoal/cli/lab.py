"""`shoal lab`: a network to try things on, described in a TOML file (docs/lab.md). Needs root."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, NetworkError, ShoalError

app = App(name="lab", help="Build a network of namespaces, run programs in it, and check that it does what was asked.")

RATE_TOLERANCE = DELAY_TOLERANCE = 0.05
"""`measure` calls a path true within these shares of what was asked."""


@app.command
def up(file: Path, /, *, play: Flag = False, capture: Path | None = None, json: Json = False) -> None:
    """Build a network, print its namespaces, and keep it until Ctrl-C.

    For example:

        shoal lab up net.toml --play
        shoal lab up net.toml --capture packets

    Args:
        file: Description of the network.
        play: Play the file's script of cuts, from now.
        capture: Folder into which every node's packets go as NODE.pcap, for tcpdump and Wireshark.
    """
    asyncio.run(_up(file, play, capture, json))


@app.command(name="exec")
def exec_(
    node: str,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    lab: int | None = None,
) -> int:
    """Run a program at a node of a network that `shoal lab up` keeps.

    For example:

        shoal lab exec home -- ping -c 3 10.77.0.1

    Args:
        node: Its name in the description.
        command: The program and its arguments, after --.
        lab: Process id of the `shoal lab up` that is meant, where there are several.
    """
    from shoal.lab import namespaces
    from shoal.lab.packet import enter_command

    if not command:
        raise ConfigError("There is no program to run.", "Write it after --, such as: shoal lab exec NODE -- ip route")
    found = [
        name
        for name, (owner, its_node) in namespaces.existing().items()
        if its_node == node and owner.alive and lab in (None, owner.pid)
    ]
    if not found:
        raise NetworkError(f"No running lab has a node {node}.", "Start one in another terminal: shoal lab up FILE")
    if len(found) > 1:
        pids = ", ".join(name.split("-")[2] for name in found)
        raise ConfigError(f"Several labs have a node {node}.", f"Say which by --lab and one of {pids}.")
    # Not exec: the terminal's Ctrl-C reaches the program, and we still return its exit code.
    with subprocess.Popen(enter_command(found[0], command)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@app.command
def measure(file: Path, /, *, attempts: int = 3, json: Json = False) -> int:
    """Build a network and measure rate, delay and loss from every node to the next, beside what was asked.

    For example:

        shoal lab measure net.toml

    Args:
        file: Description of the network.
        attempts: A path that is off, as on a busy machine, is measured so often; the best counts.
    """
    return asyncio.run(_measure(file, attempts, json))


async def _up(file: Path, play: bool, capture: Path | None, json: bool) -> None:
    from shoal.lab.network import load_network
    from shoal.lab.packet import packet_lab

    network = load_network(file)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with packet_lab(network, capture=capture) as lab:
        rows = [
            {
                "node": node.name,
                "address": lab.address(node.name),
                "public_address": lab.public_address(node.name),
                "namespace": lab.namespace(node.name),
            }
            for node in network.nodes
        ]
        if json:
            print_json({"pid": os.getpid(), "nodes": rows})
        else:
            for row in rows:
                line = f"{row['node']:20}{row['address']:16}{row['public_address']:16}{row['namespace']}"
                console().print(line, markup=False, soft_wrap=True)
        note("Run programs by: shoal lab exec NODE -- PROGRAM. Ctrl-C ends the lab.")
        if play:
            lab.play()
        await stop.wait()


async def _measure(file: Path, attempts: int, json: bool) -> int:
    from shoal.lab.measure import Measurement
    from shoal.lab.measure import measure as measure_path
    from shoal.lab.network import load_network
    from shoal.lab.packet import packet_lab

    network = load_network(file)
    names = [node.name for node in network.nodes]
    if len(names) < 2:
        raise ConfigError(f"{file} has one node.", "A path needs two.")
    rows: list[dict[str, Any]] = []
    async with packet_lab(network) as lab:
        for source, target in zip(names, [*names[1:], names[0]], strict=True):
            best: Measurement | None = None
            try:
                for _ in range(max(1, attempts)):
                    seen = await measure_path(lab, source, target)
                    if best is None or _off(seen) < _off(best):
                        best = seen
                    if _off(best) <= 1:
                        break
            except ShoalError as error:
                note(f"{source} to {target}: {error}")
            row: dict[str, Any] = {"source": source, "target": target, "within_5_percent": False}
            if best is not None:
                row |= {
                    "within_5_percent": _off(best) <= 1,
                    "asked_mbps": best.asked_mbps,
                    "mbps": best.mbps,
                    "asked_delay_ms": best.asked_delay_ms,
                    "delay_ms": best.delay_ms,
                    "asked_loss": best.asked_loss,
                    "loss": best.loss,
                }
            rows.append(row)
            if not json:
                _show(row)
    if json:
        print_json({"paths": rows})
    return 0 if all(row["within_5_percent"] for row in rows) else 1


def _off(seen: Any) -> float:
    """The worse of both errors, in units of what is tolerated."""
    return float(max(seen.rate_error / RATE_TOLERANCE, seen.delay_error / DELAY_TOLERANCE))


def _show(row: dict[str, Any]) -> None:
    def pair(key: str, digits: int) -> str:
        asked, seen = row.get(f"asked_{key}"), row.get(key)
        return f"{key.replace('_', ' ')} " + " of ".join("-" if x is None else f"{x:.{digits}f}" for x in (seen, asked))

    verdict = "within 5 %" if row["within_5_percent"] else "OFF"
    way = f"{row['source']} > {row['target']}"
    line = f"{way:30}{pair('mbps', 2):26}{pair('delay_ms', 2):26}{pair('loss', 3):24}{verdict}"
    console().print(line, markup=False, soft_wrap=True)
