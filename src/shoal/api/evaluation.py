"""How good a model is on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.api._background import wait
from shoal.api.engine import Engine

if TYPE_CHECKING:
    from shoal.protocol.episode import Episode


@dataclass(frozen=True)
class Evaluation:
    """What held-out questions showed."""

    questions: int
    """Answered; those that infrastructure spoilt are in `void`."""
    void: int
    accuracy: float
    """Strict: the reply ends with the right answer."""
    accuracy_lenient: float
    interval: tuple[float, float]
    """Of the strict accuracy, 95 %."""
    response_tokens_mean: float
    episodes: tuple[Episode, ...]
    """Every question with what was answered, token by token."""


def evaluate(
    model: Engine | str | Path = "embedded",
    config: str | Path = "arithmetic",
    overrides: Sequence[str] = (),
    *,
    questions: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int = 1,
    device: str = "auto",
) -> Evaluation:
    """Measure a model on held-out questions, as `shoal eval` does.

    Examples:
        ```python
        import shoal

        found = shoal.evaluate("embedded", "arithmetic", questions=100)
        print(f"{found.accuracy:.1%}", found.interval)
        ```

    Args:
        model: an engine that is open, or what `Engine` takes.
        config: the configuration whose environments ask: a TOML file, or the name of a shipped one.
        overrides: keys of it to change, as on the command line: `["--model.context_tokens=512"]`.
        questions: distinct held-out questions, over all environments; absent: as many as the configuration says.
        max_tokens: longest answer of one turn; absent: as the configuration says.
        temperature: 0 is greedy.
        seed: of the sampling, where `temperature` is above 0.
        threads: CPU threads, where the model is loaded here.
        device: auto, cpu, cuda or cuda:N, where the model is loaded here.

    Raises:
        ConfigError: the configuration cannot be used.
        ModelError: the model cannot be had or loaded.
    """
    from shoal.cli.eval import accuracy_of, all_answered
    from shoal.config import load_config
    from shoal.coordinator.tasks import make_environments

    lengths = {"questions": questions, "max_tokens": max_tokens}
    given = [f"--eval.{key}={value}" for key, value in lengths.items() if value is not None]
    settings = load_config(config, [*overrides, *given])
    environments = make_environments(settings)
    engine = model
    if not isinstance(engine, Engine):
        context = settings.model.context_tokens
        engine = Engine(engine, dtype=settings.model.dtype, device=device, threads=threads, context_tokens=context)
    try:
        episodes = wait(all_answered(engine.local, settings, environments, temperature=temperature, seed=seed))
    finally:
        if engine is not model:
            engine.close()
    found = accuracy_of(episodes)
    low, high = found.pop("interval")
    return Evaluation(**found, interval=(low, high), episodes=tuple(episodes))
