"""A run's metrics to a tracker people already use, beside `metrics.jsonl`, if the configuration asks for one.

Invariants: a tracker's package is asked for before anything starts; what reaches it are the very numbers of
`metrics.jsonl`; nothing is sent anywhere unless `output.tracker` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from shoal.config import Config
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}

PROJECT = "shoal"

Log = Callable[[int, dict[str, float]], object]
"""Takes the numbers of a step."""


def check_tracker(config: Config) -> None:
    """Raise `ConfigError` where the tracker's package is not installed."""
    package = PACKAGES.get(config.output.tracker)
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            f"output.tracker = '{config.output.tracker}' needs the package {package}, which is not installed.",
            f"Install it (pip install 'shoal[{config.output.tracker}]'), or set output.tracker to 'none'.",
        )


def numbers_of(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Step and numbers of a line of `metrics.jsonl`; an evaluation's are named `heldout/…`."""
    evaluated = line.get("kind") == "eval"
    prefix, at = ("heldout/", "version") if evaluated else ("", "step")
    skipped = {"time", "kind", at}
    return int(line[at]), {
        f"{prefix}{key}": float(value)
        for key, value in line.items()
        if key not in skipped and isinstance(value, int | float)
    }


@contextmanager
def tracking(config: Config, run: RunDir) -> Iterator[None]:
    """While inside, each line of `metrics.jsonl` reaches the configured tracker, too; `check_tracker` has passed.

    TensorBoard's files are in the run's folder. W&B and trackio write where their own settings say (`WANDB_MODE`,
    `WANDB_DIR`, `TRACKIO_DIR`); a resumed run goes on under its name.
    """
    if config.output.tracker == "none":
        yield
        return
    with {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[config.output.tracker](config, run) as log:

        def told(line: Mapping[str, Any]) -> None:
            log(*numbers_of(line))

        run.on_metric = told
        try:
            yield
        finally:
            run.on_metric = None


@contextmanager
def _tensorboard(_: Config, run: RunDir) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(config: Config, run: RunDir) -> Iterator[Log]:
    import wandb

    session = wandb.init(
        project=PROJECT, name=run.name, id=run.name, resume="allow", config=config.model_dump(mode="json")
    )
    try:
        # An evaluation of an earlier version may end late, and W&B takes steps in rising order only.
        yield lambda step, values: session.log({**values, "step": step})
    finally:
        session.finish()


@contextmanager
def _trackio(config: Config, run: RunDir) -> Iterator[Log]:
    import trackio

    session = trackio.init(
        project=PROJECT, name=run.name, resume="allow", config=config.model_dump(mode="json"), embed=False
    )
    try:
        yield lambda step, values: session.log(values, step=step)
    finally:
        session.finish()
