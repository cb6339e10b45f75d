"""`shoal debug`: what every node of a run does at this very moment, and whether the run kept its promises."""

from __future__ import annotations

import asyncio
import io
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from shoal.cli.output import console, print_json
from shoal.cli.parameters import Json
from shoal.errors import NetworkError, RecordError, RunError, StorageError

if TYPE_CHECKING:
    from shoal.cli.reach import Reached, Target
    from shoal.protocol.status import NodeView

app = App(name="debug", help="Find out where a run hangs, and whether it kept its promises.")

ASKED_AT_ONCE = 8
MAX_THREADS = 200


@app.command
def dump(run: str = "", /, *, node: str = "", output: Path | None = None, json: Json = False) -> None:
    """Write down what every node of a run does: stacks, waits, queues, leases, counters, memory, open files.

    Nodes that do not answer are named, with how long they have been silent and, if their process is this machine's,
    what the system says of it. Tickets, keys and the values of variables are not in the file.

    For example:

        shoal debug dump
        shoal debug dump runs/arithmetic-20260101-120000 --node learner
        shoal debug dump shoal1AbC... --output hang.txt

    Args:
        run: A run's folder or name, or a ticket of it; by default the newest run.
        node: Only this node, by name or id.
        output: Where to write; by default dump-RUN-TIME.txt.
    """
    from shoal.cli.reach import find_target, running_process

    target = find_target(run)
    if target.folder is not None and running_process(target.folder) is None:
        raise RunError(f"run '{target.name}' is not running.", "`shoal status` and `shoal logs` tell what there is.")
    path = output or Path(f"dump-{target.name}-{time.strftime('%Y%m%d-%H%M%S')}.txt")
    text, rows = asyncio.run(_collect(target, node))
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}.", "Choose another place by --output."
        ) from None
    if json:
        print_json({"file": str(path), "nodes": rows})
        return
    for row in rows:
        words = "answered" if row["answered"] else f"silent for {row['silent_s']:.0f} s: {row['why']}"
        console().print(f"{row['name']}: {words}", markup=False, soft_wrap=True)
    console().print(f"written to {path}", markup=False, soft_wrap=True)


@app.command
def audit(run: str = "", /, *, json: Json = False) -> int:
    """Check a run's folder: nothing accepted is lost, nothing was trained twice, nothing staler than S.

    Works on runs that are over, were killed, or go on.

    For example:

        shoal debug audit
        shoal debug audit runs/arithmetic-20260101-120000 --json

    Args:
        run: A run's folder or name; by default the newest run.
    """
    from dataclasses import asdict

    from shoal.cli.reach import find_target
    from shoal.config.load import load_config
    from shoal.coordinator.audit import audit as judge

    target = find_target(run)
    if target.folder is None:
        raise RunError("a ticket does not lead to a run's folder.", "Audit a run where it was started.")
    found = judge(target.folder, max_staleness=load_config(target.folder / "config.toml").learner.max_staleness)
    if json:
        print_json({**asdict(found), "good": found.good})
    else:
        for name, value in asdict(found).items():
            if name != "problems":
                console().print(f"{name:20} {value}", markup=False)
        for problem in found.problems:
            console().print(problem, markup=False, soft_wrap=True)
    return 0 if found.good else 1


async def _collect(target: Target, only: str) -> tuple[str, list[dict[str, Any]]]:
    """The file's text, and who answered."""
    from shoal.cli.logs import find_node
    from shoal.cli.reach import reaching

    head = f"run {target.name}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    try:
        async with reaching(target) as reached:
            nodes, said = await _everyone(reached)
            if only:
                nodes = [await find_node(reached, only)]
            slots = asyncio.Semaphore(ASKED_AT_ONCE)
            parts = await asyncio.gather(*(_ask(reached, node, slots) for node in nodes))
    except NetworkError as error:
        # What hangs may be the coordinator itself; then what the system says of its process is all there is.
        facts = _coordinator_process(target)
        if not facts:
            raise
        row = {"name": "coordinator", "node_id": "", "answered": False, "silent_s": 0.0, "why": error.problem}
        return f"{head}\n\n{error}\n\n{facts}\n", [row]
    rows = [row for row, _ in parts]
    return "\n\n".join([head, said, *(text for _, text in parts)]) + "\n", rows


async def _everyone(reached: Reached) -> tuple[list[NodeView], str]:
    """The coordinator and all that have joined; and the run's state in words."""
    from rich.console import Console

    from shoal.cli.status import picture
    from shoal.protocol.status import NodeView

    status = await reached.status()
    own = status.coordinator
    first = NodeView(
        node_id=own.node_id, name=own.name, role=own.role, state="active", public_key=reached.coordinator_key
    )
    page = Console(width=160, record=True, file=io.StringIO())
    page.print(picture(status))
    return [first, *(node for node in status.nodes if node.node_id)], page.export_text()


async def _ask(reached: Reached, node: NodeView, slots: asyncio.Semaphore) -> tuple[dict[str, Any], str]:
    row: dict[str, Any] = {
        "name": node.name,
        "node_id": node.node_id,
        "answered": False,
        "silent_s": node.silent_s,
        "why": "",
    }
    title = f"{'=' * 8} {node.role} {node.name} {node.node_id}"
    started = time.monotonic()
    try:
        async with slots:
            told = await reached.dump(node)
    except (NetworkError, RecordError) as error:
        row["why"] = error.problem
        row["silent_s"] = node.silent_s + time.monotonic() - started
        facts = ""
        if node.status is not None and node.status.host == platform.node():
            facts = process_facts(node.status.pid)
        return row, f"{title}\ndoes not answer, silent for {row['silent_s']:.0f} s: {error.problem}\n{facts}".rstrip()
    row["answered"], row["silent_s"] = True, 0.0
    sections = (f"{'-' * 4} {name}\n{text}" for name, text in told.sections.items())
    return row, "\n\n".join([title, *sections])


def _coordinator_process(target: Target) -> str:
    from shoal.cli.reach import running_process

    process = running_process(target.folder) if target.folder is not None else None
    return f"coordinator\n{process_facts(process)}" if process else ""


def process_facts(pid: int) -> str:
    """What the system says of a process of this machine: its state, and where in the kernel each thread is."""
    lines = []
    for part in ("Name", "State", "VmRSS", "Threads"):
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith(f"{part}:"):
                lines.append(" ".join(line.split()))
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        threads = []
    for thread in threads[:MAX_THREADS]:
        base = f"/proc/{pid}/task/{thread}"
        state = _read(f"{base}/stat").rpartition(")")[2].split()[:1]
        name, where = _read(f"{base}/comm").strip(), _read(f"{base}/wchan").strip("0 \n")
        lines.append(f"thread {thread} {name}: {' '.join(state)}{f' in {where}' if where else ''}")
    return "\n".join([f"process {pid}", *lines]) if lines else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
