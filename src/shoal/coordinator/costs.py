"""What a run has cost, what of it came to nothing, and what a held-out point cost: told in the summary, by
`shoal status` and on the report's page.

    lost to a kind  =  dollars of workers while they worked · rollouts that ended so / rollouts leased
    a point         =  all dollars / points of strict held-out accuracy gained, from the first evaluation to the newest

Invariants: nothing is told where nothing has a price, and no price of a point where none was gained; what is told is
finite.
"""

from __future__ import annotations

from shoal.coordinator.control import Control

ENDED_BADLY = ("void", "rejected", "expired")
"""Ends of a lease that bring no rollout."""

PER_POINT = "usd_per_heldout_point"


def costs(control: Control, now: float) -> dict[str, float]:
    """Dollars by what they went to: `usd` is all of them, `usd_idle` was paid for machines without work."""
    provisioning = control.provisioning
    if not provisioning.is_priced:
        return {}
    size, leased = control.config.rollout.group_size, control.book.counts
    lost = {kind: leased[kind] for kind in ENDED_BADLY}
    left_out = control.filtering.num_left_out if control.filtering.is_on else 0
    lost["stale"] = (control.queue.counts["swept"] - left_out) * size
    if control.filtering.is_on:
        lost["filtered"] = left_out * size
    a_rollout = provisioning.working_usd(now) / max(1, leased["leased"])
    found = {"usd": provisioning.usd(now), "usd_idle": provisioning.ledger.idle_usd(now)}
    found |= {f"usd_lost_{kind}": number * a_rollout for kind, number in lost.items()}
    gained = _points(control)
    if gained > 0:
        found[PER_POINT] = found["usd"] / gained
    return found


def _points(control: Control) -> float:
    """Points of strict accuracy gained since the first evaluation; 0 where there are not two."""
    results = control.evals.results
    if 0 not in results or len(results) < 2:
        return 0.0
    return 100 * (results[max(results)]["strict"] - results[0]["strict"])


def by_machine(control: Control, now: float) -> dict[str, float]:
    """Dollars by who cost them, in this life of the process; those that cost nothing are left out."""
    found: dict[str, float] = {}
    for node_id, account in control.provisioning.ledger.accounts.items():
        name = control.name_of(node_id)
        found[name] = found.get(name, 0.0) + account.rental_usd(now) + account.egress_usd
    return {name: usd for name, usd in found.items() if usd > 0}
