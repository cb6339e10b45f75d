"""Events as a table, for people."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.event import Event
from shoal.serving.console.html import Markup, badge, clock, empty, short, table
from shoal.serving.console.traces import text

BAD = ("died", "expired", "void", "refused", "rejected", "excluded", "revoked", "given_up", "swept")
GOOD = ("joined", "published", "activated", "returned", "started")


def happened(events: Sequence[Event], limit: int) -> Markup:
    """The newest first."""
    if not events:
        return empty("Nothing has happened yet.")
    rows = []
    for event in list(events)[: -limit - 1 : -1]:
        word = event.kind.rpartition(".")[2]
        kind = "bad" if word in BAD else "good" if word in GOOD else ""
        told = ", ".join(f"{key} {short(text(value), 80)}" for key, value in list(event.data.items())[:8])
        rows.append((clock(event.time), badge(event.kind, kind), event.node[:16], short(told, 240)))
    return table(("time", "what", "node", ""), rows)
