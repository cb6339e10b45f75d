"""How fast a run of ten thousand workers is simulated, by the code that real runs plan with.

10,000 machines of mixed speed, price, region and link, half of which could be taken away at any time; R = 1,024 leases
a step, S = 11, activation on, 1,000 steps (fewer with an argument). `seconds` is processor time of this process, which
uses one core; `wall_s` is what a busy machine makes of it. Everything shown is a simulation.
"""

from __future__ import annotations

import random
import sys
import time

from shoal.planning.scenario import Machine, Scenario
from shoal.planning.simulator import simulate

from _common import benchmark, emit

MACHINES = 10_000
LEASES_PER_STEP = 1024
TRAIN_S = 60.0
OVERSUPPLY = 6.0
"""The fleet offers this many times the rate that the learner needs, so that activation has a choice."""


def mixed_fleet(seed: int = 0) -> tuple[Machine, ...]:
    """Machines whose speeds differ sevenfold and whose prices hardly follow them."""
    rng = random.Random(seed)
    speeds = [rng.uniform(0.3, 2.0) for _ in range(MACHINES)]
    scale = OVERSUPPLY * LEASES_PER_STEP / TRAIN_S / sum(speeds)
    return tuple(
        Machine(
            id=f"m{i}",
            rate=speed * scale,
            price_usd_per_hour=speed * rng.uniform(0.2, 0.6),
            billing=rng.choice(("per_use", "per_hour")),
            region=rng.choice(("us", "eu", "asia", "sa")),
            uplink_bytes_per_s=rng.choice((2.5e6, 12.5e6, 125e6)),
            downlink_bytes_per_s=rng.choice((12.5e6, 37.5e6, 125e6)),
            losses_per_hour=rng.choice((0.0, 0.1)),
            absent_s=900.0,
        )
        for i, speed in enumerate(speeds)
    )


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    scenario = Scenario(
        machines=mixed_fleet(),
        leases_per_step=LEASES_PER_STEP,
        max_staleness=11,
        train_s=TRAIN_S,
        steps=steps,
        snapshot_bytes=300e6,
        source_bytes_per_s=125e6,
        hop_s=1.0,
        straggler_share=0.01,
        straggler_factor=3.0,
        day_amplitude=0.3,
        activation=True,
    )
    wall, processor = time.perf_counter(), time.process_time()
    outcome = simulate(scenario)
    seconds = time.process_time() - processor
    row = {
        "machines": MACHINES,
        "steps": steps,
        "leases": outcome.counts["leased"],
        "events": outcome.events,
        "simulated_hours": outcome.elapsed_s / 3600,
        "active_workers": outcome.active_workers,
        "utilisation": outcome.utilisation,
        "predicted_utilisation": outcome.predicted_utilisation,
        "staleness_mean": outcome.mean_staleness,
        "swept": outcome.counts["swept"],
        "void": outcome.counts["void"],
        "usd_per_step": outcome.usd_per_step,
        "interval": outcome.interval,
    }
    emit(
        [row],
        {
            "seconds": seconds,
            "wall_s": time.perf_counter() - wall,
            "leases_per_second": outcome.counts["leased"] / seconds,
            "staleness_violations": outcome.violations,
        },
    )


if __name__ == "__main__":
    benchmark(main)
