"""A fleet file: what a run asks, which machines could be had, and what they cost; the input of `shoal plan`.

One TOML file, checked like any configuration: unknown keys are refused, units are in the names. Rates are in rollouts a
second; a class of `count` machines stands for that many alike.

    [run]
    rollouts_per_step = 1024
    train_s = 60
    max_staleness = 4
    snapshot_mb = 8200

    [learner]
    price_usd_per_hour = 10.76
    uplink_mbps = 1000

    [[workers]]
    name = "rtx4090"
    count = 40
    rollouts_per_s = 0.9
    price_usd_per_hour = 0.34
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from shoal.config.base import Section
from shoal.config.toml import NoToml, tables_of
from shoal.errors import ConfigError
from shoal.planning.activation import HEADROOM, Billing
from shoal.planning.scenario import Machine, Scenario

MAX_FILE_BYTES = 1 << 20
MAX_MACHINES = 100_000
"""More than any plan is made for, and what one table may ask for by its counts."""

BYTES_PER_MEGABIT = 125_000.0


class Run(Section):
    """`[run]`: what is asked of the workers."""

    rollouts_per_step: int = Field(ge=1, le=1 << 20)
    """R: rollouts that one optimizer step consumes."""
    train_s: float = Field(gt=0)
    """T_train: seconds of an optimizer step."""
    max_staleness: int = Field(default=2, ge=0, le=64)
    """S."""
    rollout_s: float | None = Field(default=None, ge=0)
    """Seconds from a rollout's start to its acceptance; absent: each worker's slots divided by its rate."""
    snapshot_mb: float = Field(default=0.0, ge=0)
    """Megabytes that reach every worker with each publication: a delta's, where deltas are sent."""
    bcast_s: float | None = Field(default=None, ge=0)
    """Seconds for a snapshot to reach the active workers; absent: from its size and the links."""
    stall: float = Field(default=0.0, ge=0, le=1)
    """Share of that time in which workers do not generate: 0 where snapshots are staged, 1 where sampling pauses."""


class Learner(Section):
    """`[learner]`: the machine that trains."""

    price_usd_per_hour: float = Field(default=0.0, ge=0)
    """Of all its devices together."""
    uplink_mbps: float = Field(default=1000.0, gt=0)
    """Megabits a second that it can send."""
    egress_usd_per_gb: float = Field(default=0.0, ge=0)
    """Price of a gigabyte sent."""


class Workers(Section):
    """`[[workers]]`: machines that are alike."""

    name: str = Field(min_length=1, max_length=64)
    """Name of the class."""
    count: int = Field(default=1, ge=1, le=MAX_MACHINES)
    """How many could be had."""
    rollouts_per_s: float = Field(gt=0)
    """Of one machine with all slots taken."""
    slots: int = Field(default=1, ge=1, le=65536)
    """Rollouts that it makes at once."""
    price_usd_per_hour: float = Field(default=0.0, ge=0)
    """Of one machine."""
    billing: Annotated[Billing, Field()] = "per_use"
    """`per_use` (by the second, while active) or `per_hour` (a begun hour is paid)."""
    committed: bool = False
    """Paid for whether it is used or not."""
    region: str = Field(default="", max_length=64)
    """Machines of one region have the same hours of busy links."""
    up_mbps: float = Field(default=100.0, gt=0)
    """Megabits a second that one machine can send."""
    down_mbps: float = Field(default=500.0, gt=0)
    """Megabits a second that one machine can receive."""
    losses_per_hour: float = Field(default=0.0, ge=0)
    """How often one machine is taken away, as spot machines are."""
    absent_s: float = Field(default=600.0, gt=0)
    """Mean time until a replacement is there."""


class Colocated(Section):
    """`[colocated]`: the fleet to compare with, which generates and trains in turn on the same devices."""

    price_usd_per_hour: float = Field(gt=0)
    """Of the whole fleet."""
    rollouts_per_s: float = Field(gt=0)
    """While it generates."""
    train_s: float | None = Field(default=None, gt=0)
    """Seconds that it trains; absent: as long as the learner."""


class Fleet(Section):
    """A whole fleet file."""

    run: Run
    """What is asked."""
    learner: Learner = Learner()
    """Who trains."""
    workers: Annotated[tuple[Workers, ...], Field(strict=False, min_length=1, max_length=1000)]
    """Who generates."""
    colocated: Colocated | None = None
    """What to compare with."""

    def machines(self) -> tuple[Machine, ...]:
        """Every single machine."""
        return tuple(
            Machine(
                id=f"{w.name}-{i}",
                rate=w.rollouts_per_s,
                slots=w.slots,
                price_usd_per_hour=w.price_usd_per_hour,
                billing=w.billing,
                committed=w.committed,
                region=w.region,
                uplink_bytes_per_s=w.up_mbps * BYTES_PER_MEGABIT,
                downlink_bytes_per_s=w.down_mbps * BYTES_PER_MEGABIT,
                losses_per_hour=w.losses_per_hour,
                absent_s=w.absent_s,
            )
            for w in self.workers
            for i in range(w.count)
        )

    def scenario(self, *, max_staleness: int, steps: int, seed: int, headroom: float = HEADROOM) -> Scenario:
        """The run to simulate under a bound, with workers activated as they are needed."""
        return Scenario(
            machines=self.machines(),
            leases_per_step=self.run.rollouts_per_step,
            max_staleness=max_staleness,
            train_s=self.run.train_s,
            steps=steps,
            snapshot_bytes=self.run.snapshot_mb * 1e6,
            source_bytes_per_s=self.learner.uplink_mbps * BYTES_PER_MEGABIT,
            bcast_s=self.run.bcast_s,
            stall=self.run.stall,
            activation=True,
            headroom=headroom,
            learner_usd_per_hour=self.learner.price_usd_per_hour,
            egress_usd_per_byte=self.learner.egress_usd_per_gb / 1e9,
            seed=seed,
        )


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or a key or value cannot be used.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The fleet file {path} cannot be read: {error.strerror}.", "Check the path.") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(raw)} bytes.", f"A fleet file has at most {MAX_FILE_BYTES}.")
    try:
        text = raw.decode("utf-8")
        data = tables_of(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except NoToml as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", "Correct that line.") from None
    return fleet_from(data, str(path))


def fleet_from(data: Mapping[str, Any], name: str) -> Fleet:
    """The fleet in raw tables; raises as `load_fleet` does."""
    try:
        fleet = Fleet.model_validate(data)
    except ValidationError as error:
        raise _explained(error, name) from None
    names = [w.name for w in fleet.workers]
    if len(set(names)) < len(names):
        raise ConfigError(f"In {name}: two classes of workers share a name.", "Give each [[workers]] its own.")
    if sum(w.count for w in fleet.workers) > MAX_MACHINES:
        raise ConfigError(f"In {name}: there are more than {MAX_MACHINES} machines.", "Lower the counts.")
    return fleet


def _explained(error: ValidationError, name: str) -> ConfigError:
    """The first finding in words."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            problem = f'there is no key "{first["loc"][-1]}" ({path}).'
        case "missing":
            problem = f"{path} is missing."
        case _:
            problem = f"{path} = {str(first['input'])[:80]} cannot be used: {first['msg']}."
    return ConfigError(f"In {name}: {problem}", "docs/capacity.md lists the keys of a fleet file.")
