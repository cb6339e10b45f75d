"""Who takes part: nodes and what they do, who waits for whom, links and their delays, stages, the roster."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from shoal.protocol.status import NodeView, RunStatus, Wait
from shoal.serving.console.charts import network
from shoal.serving.console.house import House
from shoal.serving.console.html import (
    Markup,
    ago,
    amount,
    badge,
    dollars,
    empty,
    facts,
    join,
    link,
    num_bytes,
    percent,
    problem,
    seconds,
    section,
    short,
    table,
    tag,
)
from shoal.serving.console.runs import RunFolder
from shoal.serving.console.views.run import feeding

MAX_ROWS = 200
MAX_DRAWN = 24
TOLD_FROM_S = 2.0
STATES = {"active": "good", "idle": "", "parked": "warn", "silent": "bad", "lost": "bad", "starting": "warn"}
CHANGES = ("node.joined", "node.left", "node.returned", "node.refused", "worker.parked", "worker.activated",
           "worker.excluded", "grants.revoked", "process.died")  # fmt: skip


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    run = house.run(query.get("run", ""))
    if run is None:
        return empty("There is no run here.", "Name one, or a ticket of it: shoal console runs/NAME.")
    parts: list[Markup] = []
    status = run.coordinator.status if run.coordinator is not None else None
    if run.coordinator is not None and run.coordinator.problem:
        remark = f" What follows was said {ago_monotonic(run.coordinator.heard_at)}." if status is not None else ""
        parts.append(problem(run.coordinator.problem + remark))
    if status is not None:
        parts += _now(status)
    elif run.folder is not None:
        parts.append(section("Nodes", _known(run.folder), note="as its events tell", id_="nodes"))
    if run.folder is not None:
        parts.append(section("Broadcast: who feeds whom", feeding(run.folder), id_="feeding"))
    return join(parts)


def ago_monotonic(heard_at: float) -> str:
    """How long ago a monotonic time was."""
    return f"{seconds(max(0.0, time.monotonic() - heard_at))} ago"


def _now(status: RunStatus) -> list[Markup]:
    nodes = list(status.nodes[:MAX_ROWS])
    waits = _waits(status)
    told = [problem(sentence) for sentence in status.silent[:16]]
    counts: dict[str, int] = {}
    for node in status.nodes:
        counts[node.state] = counts.get(node.state, 0) + 1
    note = ", ".join(f"{count} {state}" for state, count in counts.items())
    parts = [
        section("Nodes", *told, _nodes(nodes), note=note, id_="nodes"),
        section("Links", _links(status), note="round trips that nodes measured", id_="links"),
        section("Who waits for whom", waits, id_="waits"),
    ]
    if status.mode != "serving":
        parts.append(section("Rollouts", _rollouts(status), id_="rollouts"))
    return parts


def _nodes(nodes: Sequence[NodeView]) -> Markup:
    if not nodes:
        return empty("No node has joined yet.", "Start a worker: shoal worker TICKET.")
    rows = []
    for node in nodes:
        own = node.status
        doing = own.doing if own is not None else ""
        held = sum(lease.rollouts for lease in node.leases)
        state = join([badge(node.state, STATES[node.state]), f" {node.why}" if node.why else ""])
        rows.append((
            tag("b", node.name),
            node.role,
            state,
            node.version if node.version >= 0 else "–",
            amount(node.tokens_per_s, 0) if node.role == "worker" else "",
            dollars(node.price_usd_per_hour) if node.price_usd_per_hour else "0",
            f"{node.num_leases} leases, {held} rollouts" if node.num_leases else "",
            short(doing, 60),
            node.device,
            num_bytes(own.memory_bytes) if own is not None else "–",
            seconds(node.silent_s),
        ))  # fmt: skip
    columns = ("node", "role", "state", "version", "tokens/s", "$/h", "holds", "does", "device", "memory", "silent for")
    return table(columns, rows, right=(3, 4, 5, 9, 10))


def _links(status: RunStatus) -> Markup:
    names = {node.node_id: node.name for node in status.nodes if node.node_id}
    names[status.coordinator.node_id] = "coordinator"
    found: dict[frozenset[str], float] = {}
    for node in status.nodes:
        for other, delay_s in node.delays.items():
            if other in names and other != node.node_id:
                pair = frozenset((node.node_id, other))
                found[pair] = min(delay_s, found.get(pair, delay_s))
    drawn = [("coordinator", "active", status.coordinator.node_id)]
    drawn += [(node.name, node.state, node.node_id) for node in status.nodes[:MAX_DRAWN]]
    at = {node_id: number for number, (_, _, node_id) in enumerate(drawn)}
    longest = max(found.values(), default=0.0) or 1.0
    edges = []
    for pair, delay_s in sorted(found.items(), key=lambda item: -item[1]):
        one, other = sorted(pair, key=lambda node_id: at.get(node_id, len(at)))
        if one in at and other in at:
            edges.append((at[one], at[other], seconds(delay_s), 1 - delay_s / (1.25 * longest)))
    picture = network([(name, state) for name, state, _ in drawn], edges)
    rows = [
        (names[one], names[other], seconds(delay_s))
        for (one, other), delay_s in ((sorted(pair), found[pair]) for pair in found)
    ]
    if not rows:
        return join([picture, tag("p", "No node has measured a link yet.", class_="soft")])
    return tag("div", picture, table(("node", "node", "round trip"), rows[:MAX_ROWS], right=(2,)), class_="beside")


def _waits(status: RunStatus) -> Markup:
    names = {node.node_id: node.name for node in status.nodes if node.node_id}
    names[status.coordinator.node_id] = "coordinator"
    found: list[tuple[str, Wait]] = [("coordinator", wait) for wait in status.coordinator.waits]
    for node in status.nodes:
        if node.status is not None and node.state not in ("silent", "lost"):
            found += [(node.name, wait) for wait in node.status.waits]
    rows = [
        (
            name,
            short(wait.what, 80),
            names.get(wait.whom, wait.whom),
            seconds(wait.seconds),
            seconds(wait.deadline_s) if wait.deadline_s else short(wait.until, 60),
            badge("overdue", "bad") if wait.overdue else "",
        )
        for name, wait in found
        if wait.seconds >= TOLD_FROM_S
    ]
    if not rows:
        return empty("Nobody waits.")
    return table(("who", "for what", "from whom", "so far", "at most", ""), rows[:MAX_ROWS], right=(3,))


def _rollouts(status: RunStatus) -> Markup:
    counts = {name.replace("_", " "): f"{count:,}" for name, count in status.groups.items()}
    plan = {
        name.removeprefix("capacity/").replace("_", " "): amount(value)
        for name, value in status.metrics.items()
        if name.startswith("capacity/")
    }
    return tag("div", facts(counts), facts(plan) if plan else "", class_="beside")


def _known(folder: RunFolder) -> Markup:
    """The nodes as the newest events tell, where no coordinator does."""
    state = folder.state
    last: dict[str, tuple[str, float, str]] = {}
    for event in state.events:
        if event.kind in CHANGES:
            name = str(event.data.get("name", event.node))[:64]
            why = str(event.data.get("reason", ""))[:120]
            last[name] = (event.kind, event.time, why)
    if not last:
        return empty("Its newest events name no node.", link("See all events", "run", run=folder.name))
    total = state.rollouts.total() or 1
    rows = [
        (
            tag("b", name),
            badge(kind, "bad" if kind.endswith(("died", "excluded", "refused")) else ""),
            why,
            ago(at),
            f"{state.rollouts[name]:,}",
            percent(state.rollouts[name] / total) if state.rollouts[name] else "–",
        )
        for name, (kind, at, why) in last.items()
    ]
    return table(("node", "last event", "why", "when", "rollouts", "share"), rows[:MAX_ROWS], right=(3, 4, 5))
