"""`shoal doctor`: is this machine fit to take part, and is the way to a run open?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal.cli.output import console, print_json
from shoal.cli.parameters import Json

if TYPE_CHECKING:
    from shoal.cli.checks_machine import Check

MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def run(target: str = "", /, *, json: Json = False) -> int:
    """Check this machine and, with a ticket, the way to its run.

    Processor, memory, GPU, packages, disk, keys, sandbox; with a ticket also every address in it, TLS and the pinned
    key, the clock, the versions of all nodes, round trip and rate. Each line that is not ok says what to do. The exit
    code is 1 if something failed; warnings do not count.

    For example:

        shoal doctor
        shoal doctor shoal1AbC...
        shoal doctor runs/arithmetic-20260101-120000 --json

    Args:
        target: A ticket, a file that holds one, or the folder or name of a run; without it, only this machine.
    """
    from shoal.cli.checks_machine import machine_checks

    found: list[Check] = []

    def note_check(check: Check) -> None:
        found.append(check)
        if not json:
            _show(check)

    for check in machine_checks():
        note_check(check)
    if target:
        asyncio.run(_network(target, note_check))
    failed = [check.name for check in found if check.state == "failed"]
    if json:
        print_json({"ok": not failed, "checks": [check._asdict() for check in found]})
    else:
        warnings = sum(check.state == "warning" for check in found)
        words = f"failed: {', '.join(failed)}" if failed else "nothing failed"
        console().print(f"{len(found)} checks, {warnings} warnings, {words}", markup=False, soft_wrap=True)
    return 1 if failed else 0


async def _network(target: str, note_check: Callable[[Check], None]) -> None:
    from shoal.cli.checks_network import network_checks
    from shoal.cli.reach import find_target

    async for check in network_checks(find_target(target)):
        note_check(check)


def _show(check: Check) -> None:
    from rich.text import Text

    line = Text.assemble((f"{check.state:8}", MARKS[check.state]), f"{check.name}: {check.detail}")
    if check.remedy:
        line.append(f"  {check.remedy}", style="bold")
    console().print(line, soft_wrap=True)
