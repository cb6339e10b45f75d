"""`shoal status`: who takes part in a run, how they are, and who waits for whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, error_console, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, NetworkError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shoal.cli.reach import Reached, Target
    from shoal.protocol.status import NodeView, RunStatus, Wait

WATCH_EVERY_S = 2.0

TOLD_FROM_S = 2.0
"""Shorter waits are told in `--json` only."""


def run(target: str = "", /, *, watch: Flag = False, json: Json = False) -> None:
    """Show who takes part in a run, how they are, and who waits for whom.

    On the machine that started the run, name it or leave it away: the newest is meant. From elsewhere a ticket does.
    A run that is not running is told from its folder: how far it came and how to go on.

    For example:

        shoal status
        shoal status runs/arithmetic-20260101-120000 --watch
        shoal status shoal1AbC... --json

    Args:
        target: A run's folder or name, or a ticket of it, or a file that holds one.
        watch: Show it anew every two seconds until Ctrl-C.
    """
    from shoal.cli.ended import read_ended
    from shoal.cli.reach import find_target, running_process

    if watch and json:
        raise ConfigError("--watch and --json exclude each other.", "Call `shoal status --json` again and again.")
    found = find_target(target)
    if found.folder is not None and running_process(found.folder) is None:
        ended = read_ended(found.folder)
        if json:
            print_json(ended.as_json())
            return
        last = ended.last_event
        console().print(ended.sentence, markup=False, soft_wrap=True)
        if last is not None:
            told = " ".join(f"{key}={value}" for key, value in last.data.items())
            console().print(f"last event: {last.kind} {last.node} {told}".rstrip(), markup=False, soft_wrap=True)
        if spent := _spent(ended.costs):
            console().print(spent, markup=False, soft_wrap=True)
        console().print(f"next: {ended.next}", markup=False, soft_wrap=True)
        return
    asyncio.run(_watch(found) if watch else _once(found, json))


async def _once(target: Target, json: bool) -> None:
    from shoal.cli.reach import reaching
    from shoal.protocol.codec import builtins

    async with reaching(target) as reached:
        status = await reached.status()
    if json:
        print_json({"running": True, **builtins(status)})
    else:
        console().print(picture(status))


async def _watch(target: Target) -> None:
    from rich.live import Live

    from shoal.cli.reach import reaching

    async with reaching(target) as reached:
        with Live(console=error_console(), auto_refresh=False) as live:
            await _show_again_and_again(reached, live)


async def _show_again_and_again(reached: Reached, live: Any) -> None:
    from rich.console import Group
    from rich.text import Text

    shown: RenderableType = Text("")
    heard_at = time.monotonic()
    while True:
        try:
            status = await reached.status()
        except NetworkError as error:
            silent_s = time.monotonic() - heard_at
            live.update(Group(shown, Text(f"no answer for {silent_s:.0f} s: {error}", style="bold red")), refresh=True)
        else:
            heard_at = time.monotonic()
            shown = picture(status)
            live.update(shown, refresh=True)
            if status.ended:
                return
        await asyncio.sleep(WATCH_EVERY_S)


def picture(status: RunStatus) -> RenderableType:
    """The run as a table, its waits, and whatever keeps others waiting."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = (
        f"run {status.run}, {status.mode}: step {status.step} of {status.steps}, newest version {status.published}, "
        f"staleness at most {status.most_stale} of {status.max_staleness}, {_money(status.usd_per_hour)}"
    )
    if status.mode == "serving":
        title = status.run
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("node", "role", "state", "version", "tokens/s", "$/h", "holds", "does"):
        table.add_column(column, overflow="fold")
    own = status.coordinator
    table.add_row(own.name, own.role, "active", "", "", "", "", own.doing)
    for node in status.nodes:
        style = {"silent": "bold red", "lost": "red", "parked": "yellow"}.get(node.state, "")
        table.add_row(*(Text(cell) for cell in _cells(node, status.published)), style=style)
    parts: list[RenderableType] = [Text(title), table]
    told = [line for line in (_plan(status.metrics), _spent(status.metrics)) if line]
    parts[1:1] = [Text(line) for line in told]
    waits = list(_waits(status))
    if waits:
        parts += [Text(""), *(Text(line, style="dim") for line in waits)]
    if status.silent:
        parts += [Text(""), *(Text(sentence, style="bold red") for sentence in status.silent)]
    if status.failure or status.ended:
        parts.append(Text(f"the run ends{f': {status.failure}' if status.failure else ''}", style="bold"))
    return Group(*parts)


def _cells(node: NodeView, published: int) -> tuple[str, ...]:
    own = node.status
    behind = published - node.version
    version = "" if node.version < 0 else f"{node.version}{f' (-{behind})' if behind > 0 else ''}"
    held = sum(lease.rollouts for lease in node.leases)
    does = ": ".join(part for part in (own.doing if own is not None else "", node.why) if part)
    if node.state in ("silent", "lost", "starting"):
        does = f"{node.silent_s:.0f} s{f', {node.why}' if node.why else ''}"
    return (
        node.name,
        node.role,
        node.state,
        version,
        f"{node.tokens_per_s:.0f}" if node.role == "worker" else "",
        f"{node.price_usd_per_hour:.2f}" if node.price_usd_per_hour else "0",
        f"{node.num_leases} leases, {held} rollouts" if node.num_leases else "",
        does,
    )


def _waits(status: RunStatus) -> list[str]:
    from shoal.fabric.waits import in_words

    names = {node.node_id: node.name for node in status.nodes if node.node_id}
    names[status.coordinator.node_id] = "coordinator"
    found: list[tuple[str, Wait]] = [("coordinator", wait) for wait in status.coordinator.waits]
    for node in status.nodes:
        if node.status is not None and node.state not in ("silent", "lost"):
            found += [(node.name, wait) for wait in node.status.waits]
    return [
        f"{name} waits for {in_words(wait, names.get(wait.whom, wait.whom))}"
        for name, wait in found
        if wait.seconds >= TOLD_FROM_S
    ]


def _plan(facts: Mapping[str, float]) -> str:
    """What the run's planner measured; empty before it has."""
    try:
        told = (
            f"workers make {facts['capacity/rate']:.2f} rollouts/s of {facts['capacity/needed_rate']:.2f} needed, "
            f"a step takes the learner {facts['capacity/step_work_s']:.1f} s, "
            f"a rollout {facts['capacity/rollout_s']:.1f} s, "
            f"a snapshot {facts['capacity/bcast_s']:.1f} s to reach all (stall {facts['capacity/stall']:.2f}); "
            f"predicted to be busy {facts['capacity/predicted_utilisation']:.0%}"
        )
    except KeyError:
        return ""
    parked = f", {facts.get('capacity/parked', 0):.0f} parked" if facts.get("capacity/parked") else ""
    return f"{told}{parked}"


def _spent(facts: Mapping[str, float]) -> str:
    """What the run has cost, and for what; empty where nothing has a price."""
    if "usd" not in facts:
        return ""
    prefix = "usd_lost_"
    wasted = {"idle": facts.get("usd_idle", 0.0)}
    wasted |= {key.removeprefix(prefix): usd for key, usd in facts.items() if key.startswith(prefix)}
    said = ", ".join(f"{usd:.2f} {what}" for what, usd in wasted.items())
    point = f"; {facts['usd_per_heldout_point']:.2f} $ a held-out point" if "usd_per_heldout_point" in facts else ""
    return f"{facts['usd']:.2f} $ so far, of that {said}{point}"


def _money(usd_per_hour: float) -> str:
    return f"{usd_per_hour:.2f} $/h" if usd_per_hour else "no price named"
