"""Who keeps others waiting, in one sentence each. Pure: what is known comes in, sentences go out.

    no sign for SILENT_AFTER_S            “local-1 silent for 6 s, holds lease g12 (8 rollouts), expires in 24 s”
    its connection went                   “attic lost 6 s ago, …”
    a wait longer than such a wait takes  “local-0 waits for the weights of version 7 from learner, 6 s, until …”
    a process of this machine is stopped  “…: process 4242 is stopped; `kill -CONT 4242` lets it go on”

Invariants: what is well is not named, and a sentence goes as soon as its cause has gone; a node that is itself silent
is not quoted on whom it waits for, because that is old.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shoal.fabric.waits import in_words
from shoal.protocol.status import MAX_SENTENCES, LeaseState, NodeState, NodeView, Wait, clipped

SILENT_AFTER_S = 5.0
"""Every node is asked every second or two, and workers speak every two: several signs are missing."""

LOST_TOLD_S = 120.0
"""So long the loss of a node is worth a sentence."""

STARTING_TOLD_S = 60.0
"""A process of this run that has not joined for so long is worth a sentence: importing torch takes seconds."""


def state_of(*, silent_s: float, connected: bool, has_work: bool, idle: tuple[NodeState, str]) -> tuple[NodeState, str]:
    """A joined node's state and, where it is not active, why."""
    if not connected:
        return "lost", "its connection went without a goodbye"
    if silent_s > SILENT_AFTER_S:
        return "silent", "it answers nothing: stopped, cut off or overloaded"
    return ("active", "") if has_work else idle


class Notice(NamedTuple):
    """Something keeps others waiting."""

    subject: str
    """What stays the same while its seconds go on."""
    text: str


def notices(
    nodes: Sequence[NodeView],
    own: Sequence[Wait],
    names: Mapping[str, str],
    process_of: Callable[[NodeView], str],
) -> list[Notice]:
    """What to tell people.

    Args:
        own: the coordinator's own waits.
        names: of nodes by id.
        process_of: a remark on a node's process, where it is one of this machine's own and stands still.
    """
    found = [notice for node in nodes if (notice := _about(node, process_of(node))) is not None]
    for node in nodes:
        if node.status is not None and node.state not in ("silent", "lost"):
            found += _overdue(node.name, node.status.waits, names)
    found += _overdue("coordinator", own, names)
    return found[:MAX_SENTENCES]


def _about(node: NodeView, process: str) -> Notice | None:
    name, silent_s = node.name, f"{node.silent_s:.0f} s"
    ending = f": {process}" if process else ""
    text = ""
    if node.state == "silent":
        text = f"{name} silent for {silent_s}{_holds(node)}{_was(node)}{ending}"
    elif node.state == "lost" and (node.silent_s < LOST_TOLD_S or process):
        lost = "; what it held is leased again" if node.role == "worker" else ""
        text = f"{name} silent for {silent_s}, its connection is lost{lost}{_was(node)}{ending}"
    elif node.state == "starting" and (node.silent_s > STARTING_TOLD_S or process):
        text = f"{name} was started {silent_s} ago and has not joined yet{ending}"
    elif process:
        text = f"{name}{ending}"
    return Notice(f"{name} {'starts' if node.state == 'starting' else 'is silent'}", clipped(text)) if text else None


def _holds(node: NodeView) -> str:
    if not node.leases:
        return ""
    first = min(node.leases, key=lambda lease: lease.left_s)
    if node.num_leases == 1:
        return f", holds {_lease(first)}, expires in {first.left_s:.0f} s"
    rollouts = sum(lease.rollouts for lease in node.leases)
    return f", holds {node.num_leases} leases ({rollouts} rollouts), the first expires in {first.left_s:.0f} s"


def _lease(lease: LeaseState) -> str:
    return f"lease {lease.id.partition('.')[0]} ({lease.rollouts} rollouts)"


def _was(node: NodeView) -> str:
    return f", said last that it {node.status.doing}" if node.status is not None and node.status.doing else ""


def _overdue(name: str, waits: Sequence[Wait], names: Mapping[str, str]) -> Iterator[Notice]:
    for wait in waits:
        if wait.overdue:
            text = f"{name} waits for {in_words(wait, names.get(wait.whom, wait.whom))}"
            yield Notice(f"{name} waits for {wait.what}", clipped(text))


def stopped_process(pid: int) -> str:
    """A remark on a process of this machine that was stopped (Ctrl-Z, SIGSTOP, a debugger); empty where it was not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return f"process {pid} is stopped; `kill -CONT {pid}` lets it go on" if state in "Tt" else ""
