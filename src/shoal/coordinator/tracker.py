"""A run's metrics to a tracker people already use, beside `metrics.jsonl`, if the configuration asks for one.

Invariants: a tracker's package is asked for before anything starts; what reaches it are the very numbers of
`metrics.jsonl`; nothing is sent anywhere unless `output.tracker` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from shoal.config import Config
from shoal.coordinator.rundir import RunDir
from shoal.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


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
    """While inside, each line of `metrics.jsonl` reaches the configured tracker, too; `check_tracker` has passed."""
    match config.output.tracker:
        case "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(run.path / "tensorboard"))

            def write(line: Mapping[str, Any]) -> None:
                step, values = numbers_of(line)
                for key, value in values.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            run.on_metric = write
            try:
                yield
            finally:
                run.on_metric = None
                writer.close()
        case "wandb":
            import wandb

            session = wandb.init(
                project="shoal", name=run.name, id=run.name, resume="allow", config=config.model_dump(mode="json")
            )

            def log(line: Mapping[str, Any]) -> None:
                step, values = numbers_of(line)
                # An evaluation of an earlier version may end late, and W&B takes steps in rising order only.
                session.log({**values, "step": step})

            run.on_metric = log
            try:
                yield
            finally:
                run.on_metric = None
                session.finish()
        case _:
            yield
