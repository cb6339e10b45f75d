"""ECHO-2's questions, simulated: who needs how many workers, how stale rollouts are, and what it costs.

Every row is a simulation by the code that runs plan with (`shoal.planning`), or that code's prediction beside it.
Parts: provision (utilisation against Σμ, both regimes), staleness (S = 0 to 11, with and without pacing), workers (4 to
256, star or relays, whole snapshots or deltas), cost (against a co-located fleet, ±30 %), surface (where that breaks
even).

Prices: RunPod's list as published by deploybase.ai/articles/runpod-gpu-pricing in March 2026, dollars a GPU-hour.
Speeds: no table of one model on all of these cards is public, so a card's rollout rate is *assumed* proportional to its
memory bandwidth (vendors' data sheets), which is what decoding is bound by. ECHO-2 (arXiv 2602.02192) reports 33 to
36 % less cost; its prices are not public, so its figure cannot be recomputed, only bracketed.

Arguments: `--plots FOLDER` draws the pictures there.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.planning.capacity import (
    Load,
    freshest_interval,
    full_rate,
    overlaps,
    provision_rate,
    publish_interval,
    utilisation,
)
from shoal.planning.scenario import Machine, Outcome, Scenario
from shoal.planning.simulator import simulate
from shoal.planning.spreading import fluid_s, star_s

from _common import benchmark, emit

R, TRAIN_S, ROLLOUT_S, STEPS = 64, 60.0, 6.0, 100
BOUNDS = (0, 1, 2, 3, 6, 11)
PROVISIONS = (0.6, 0.8, 0.9, 1.0, 1.2)
COUNTS = (4, 16, 64, 256)

CARDS = {
    "RTX 3090 spot": (0.22, 936),
    "RTX 4090 spot": (0.34, 1008),
    "RTX 5090 spot": (0.69, 1792),
    "A100 SXM spot": (1.39, 2039),
    "RTX 4090 on demand": (0.60, 1008),
    "H100 SXM on demand": (4.76, 3350),
}
"""Dollars an hour, GB/s."""
COLOCATED = "H100 SXM on demand"
DEVICES = 8
GENERATION_SHARE = 1.0
"""g: on the co-located fleet, seconds of generation to a second of training."""

SNAPSHOT_BYTES, DELTA_SHARE = 8.2e9, 0.05
"""A 4B model in bf16, and what a delta is assumed to be of it (docs/broadcast.md says what was measured)."""
MBPS = 125_000.0


def alike(rate: float, rollout_s: float = ROLLOUT_S) -> tuple[Machine, ...]:
    """Workers of one lease at a time that make `rate` together."""
    count = max(1, round(rate * rollout_s))
    return tuple(Machine(f"w{i}", rate / count) for i in range(count))


def play(load: Load, rate: float, *, paced: bool, interval: int | None = None) -> Outcome:
    """A run of equal workers under one load."""
    return simulate(
        Scenario(
            alike(rate, load.rollout_s), R, load.max_staleness, load.train_s, STEPS,
            bcast_s=load.bcast_s, stall=load.stall, paced=paced, interval=interval,
        )
    )  # fmt: skip


def provision() -> list[dict[str, Any]]:
    rows = []
    for stall in (0.0, 1.0):
        load = Load(R, TRAIN_S, 0.3 * TRAIN_S, 3, stall, ROLLOUT_S)
        minimum = provision_rate(load, publish_interval(load))
        for share in PROVISIONS:
            outcome = play(load, share * minimum, paced=False)
            rows.append(
                {
                    "part": "provision", "regime": "pausing" if stall else "overlapped", "S": 3,
                    "of_minimum": share, "utilisation": outcome.utilisation,
                    "predicted": outcome.predicted_utilisation, "swept": outcome.counts["swept"],
                    "violations": outcome.violations,
                }
            )  # fmt: skip
    return rows


def staleness() -> list[dict[str, Any]]:
    """At 1.2 × the minimum, staged: where the learner is the bottleneck and workers run ahead."""
    rows = []
    for bound in BOUNDS:
        load = Load(R, TRAIN_S, 0.3 * TRAIN_S, bound, 0.0, ROLLOUT_S)
        interval = publish_interval(load)
        rate = 1.2 * provision_rate(load, interval)
        ways = {"admission": (False, interval), "paced": (True, interval)}
        ways["paced, freshest κ"] = (True, freshest_interval(load, rate))
        for way, (paced, kappa) in ways.items():
            outcome = play(load, rate, paced=paced, interval=kappa)
            rows.append(
                {
                    "part": "staleness", "way": way, "S": bound, "κ": kappa, "full_overlap": overlaps(load, interval),
                    "utilisation": outcome.utilisation, "predicted": outcome.predicted_utilisation,
                    "predicted_idle_at_minimum": 1 - utilisation(load, interval, provision_rate(load, interval)),
                    "rate_that_ends_it": full_rate(load, interval), "staleness_mean": outcome.mean_staleness,
                    "swept": outcome.counts["swept"], "violations": outcome.violations,
                }
            )  # fmt: skip
    return rows


def workers() -> list[dict[str, Any]]:
    """The same demand on 4 to 256 workers at 100/500 Mb/s; the learner sends 1 Gb/s. S = 6."""
    rows = []
    for count in COUNTS:
        ups, downs, source = [100 * MBPS] * count, [500 * MBPS] * count, 1000 * MBPS
        for what, size in (("whole", SNAPSHOT_BYTES), ("delta", DELTA_SHARE * SNAPSHOT_BYTES)):
            for how, bcast_s in (("star", star_s(size, source, downs)), ("relays", fluid_s(size, source, ups, downs))):
                load = Load(R, TRAIN_S, bcast_s, 6, 0.0, ROLLOUT_S)
                rate = 1.05 * R / TRAIN_S
                machines = tuple(Machine(f"w{i}", rate / count, max(1, round(rate * ROLLOUT_S / count)))
                                 for i in range(count))  # fmt: skip
                load = replace(load, rollout_s=machines[0].slots / machines[0].rate)
                outcome = simulate(Scenario(machines, R, 6, TRAIN_S, STEPS, bcast_s=bcast_s))
                rows.append(
                    {
                        "part": "workers", "workers": count, "sent": what, "by": how, "bcast_s": bcast_s,
                        "κ": publish_interval(load), "utilisation": outcome.utilisation,
                        "predicted": outcome.predicted_utilisation, "staleness_mean": outcome.mean_staleness,
                        "violations": outcome.violations,
                    }
                )  # fmt: skip
    return rows


def relative_cost(generation_share: float, price_ratio: float) -> float:
    """Decoupled against co-located dollars a step: (1 + q·g) / (1 + g).

    The learner trains all the time on the devices that would generate for g seconds to each second of training; the
    workers make the same rollouts at q times the price of one.
    """
    return (1 + price_ratio * generation_share) / (1 + generation_share)


def cost() -> list[dict[str, Any]]:
    """A market of rented cards, activation at work, spot losses on; dollars from the ledger."""
    learner_usd, bandwidth = CARDS[COLOCATED]
    device_rate = R / (GENERATION_SHARE * TRAIN_S) / DEVICES
    colocated_usd = DEVICES * learner_usd * (1 + GENERATION_SHARE) * TRAIN_S / 3600
    rows = []
    for market in (*(card for card in CARDS if card != COLOCATED), "all spot"):
        names = [c for c in CARDS if c.endswith("spot")] if market == "all spot" else [market]
        machines = tuple(
            Machine(
                f"{name}-{i}", device_rate * CARDS[name][1] / bandwidth, slots=1, price_usd_per_hour=CARDS[name][0],
                losses_per_hour=0.2 if name.endswith("spot") else 0.0, region=f"r{i % 3}",
                uplink_bytes_per_s=100 * MBPS, downlink_bytes_per_s=500 * MBPS,
            )
            for name in names for i in range(48)
        )  # fmt: skip
        outcome = simulate(
            Scenario(
                machines, R, 6, TRAIN_S, STEPS, snapshot_bytes=DELTA_SHARE * SNAPSHOT_BYTES, activation=True,
                source_bytes_per_s=1000 * MBPS, hop_s=1.0, learner_usd_per_hour=DEVICES * learner_usd,
            )
        )  # fmt: skip
        trained_usd = outcome.usd - outcome.worker_usd
        per_step = [(trained_usd * a + outcome.worker_usd * b) / outcome.steps for a, b in ((1, 1), (1, 0.7), (1, 1.3))]
        change = [usd / colocated_usd - 1 for usd in per_step]
        rows.append(
            {
                "part": "cost", "market": market, "workers": outcome.active_workers, "utilisation": outcome.utilisation,
                "usd_per_step": per_step[0], "colocated_usd_per_step": colocated_usd, "change": change[0],
                "change_workers_-30%": change[1], "change_workers_+30%": change[2],
                "void": outcome.counts["void"], "swept": outcome.counts["swept"], "violations": outcome.violations,
            }
        )  # fmt: skip
    return rows


def surface() -> list[dict[str, Any]]:
    """Where it breaks even: q = 1 for every g, and how much is saved elsewhere. Arithmetic, no simulation."""
    return [
        {"part": "surface", "generation_share": g, "price_ratio": q, "change": relative_cost(g, q) - 1}
        for g in (0.25, 0.5, 1.0, 2.0, 4.0)
        for q in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3)
    ]


def draw(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Four pictures in one."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def of(part: str, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part and all(row[k] == v for k, v in wanted.items())]

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(10, 7), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        (busy, stale), (links, even) = figure.subplots(2, 2)
        for regime, colour in (("overlapped", "#2b6cb0"), ("pausing", "#dd6b20")):
            points = of("provision", regime=regime)
            x = [p["of_minimum"] for p in points]
            busy.plot(x, [p["predicted"] for p in points], "-", color=colour, label=f"{regime}, predicted")
            busy.plot(x, [p["utilisation"] for p in points], "o", color=colour, label=f"{regime}, simulated")
        busy.set(title="Learner busy against provision (S = 3)", xlabel="Σμ / minimum", ylim=(0, 1.05))
        for way in ("admission", "paced", "paced, freshest κ"):
            points = of("staleness", way=way)
            stale.plot([p["S"] for p in points], [p["staleness_mean"] for p in points], "o-", label=way)
        stale.set(title="Mean staleness at 1.2 × minimum, staged (simulated)", xlabel="S", ylabel="versions")
        for sent in ("whole", "delta"):
            for by in ("star", "relays"):
                points = of("workers", sent=sent, by=by)
                x = [p["workers"] for p in points]
                links.plot(x, [p["utilisation"] for p in points], "o-", label=f"{sent}, {by}")
        links.set(title="Learner busy against number of workers (S = 6, simulated)", xlabel="workers", ylim=(0, 1.05))
        links.set_xscale("log", base=4)
        links.set_xticks(COUNTS, [str(count) for count in COUNTS])
        grid_g = [0.1 * 1.05**i for i in range(80)]
        grid_q = [0.02 * i for i in range(81)]
        change = [[100 * (relative_cost(g, q) - 1) for g in grid_g] for q in grid_q]
        filled = even.contourf(grid_g, grid_q, change, levels=[-80, -60, -45, -30, -15, 0, 15, 30, 50], cmap="RdYlGn_r")
        figure.colorbar(filled, ax=even, label="% of the co-located cost, saved below 0")
        even.contour(grid_g, grid_q, change, levels=[0], colors="#2d3748")
        band = even.contour(grid_g, grid_q, change, levels=[-36, -33], colors="#2b6cb0", linestyles="--")
        even.clabel(band, fmt="%d %%", fontsize=7)
        even.set(title="Break-even surface (dashed: ECHO-2's −33 to −36 %)", xscale="log")
        even.set(xlabel="generation / training time, co-located", ylabel="price of a rollout, workers / co-located")
        even.set_xticks([0.1, 0.25, 0.5, 1, 2, 4], ["0.1", "0.25", "0.5", "1", "2", "4"])
        even.minorticks_off()
        for axes in (busy, stale, links):
            axes.legend(frameon=False, fontsize=8)
            axes.grid(color="#edf2f7")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "echo2.png")


def main() -> None:
    rows = []
    for part in (provision, staleness, workers, cost, surface):
        print(f"{part.__name__} …", file=sys.stderr)
        rows += part()
    if "--plots" in sys.argv:
        draw(Path(sys.argv[sys.argv.index("--plots") + 1]), rows)
    simulated = [row for row in rows if "predicted" in row]
    for row in rows:
        row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
    minimum = [row for row in rows if row["part"] == "provision" and row["of_minimum"] == 1.0]
    changes = [row["change"] for row in rows if row["part"] == "cost"]
    emit(
        rows,
        {
            "max_abs_error_utilisation_simulated": max(abs(r["utilisation"] - r["predicted"]) for r in simulated),
            "utilisation_at_minimum_simulated": min(row["utilisation"] for row in minimum),
            "staleness_violations": sum(row.get("violations", 0) for row in rows),
            "cost_change_best_market": min(changes),
            "cost_change_worst_market": max(changes),
        },
    )


if __name__ == "__main__":
    benchmark(main)
