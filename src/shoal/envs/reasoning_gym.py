"""Every generator of the reasoning-gym library by name, with its own settings and its own scorer.

A task names a seed of the generator and an item, and carries a digest of the question; whoever acts on it generates
the same item again. Items come in chunks of `CHUNK_ITEMS` that share one generator, because some load large word
lists. Training seeds lie below `HELDOUT_SEED`, held-out ones above: the splits share no seed. A generator with few
distinct questions can still repeat a training question among the held-out ones; the held-out list itself repeats none.

Invariants: what a task asks is checked against its digest (a few generators depend on Python's hash seed); no answer
is evaluated as code (`answer_guard`); a scorer that fails on an answer gives it 0 and the part `scorer_failed`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from shoal.envs.answer_guard import check_scorer, may_score
from shoal.envs.base import EnvironmentSettings, Split, check_cursor, stable_int
from shoal.envs.extract import last_line, last_number, tagged
from shoal.envs.question import QuestionEnvironment, QuestionSettings
from shoal.errors import ConfigError, TaskError
from shoal.protocol.episode import Task

CHUNK_ITEMS = 64
"""Items that share one generator. It is part of what a task means: some generators depend on it."""

HELDOUT_SEED = 2**31
"""Generator seeds from here on are held out."""

MAX_START = 2**30
"""Where a run's training seeds may start; a cursor below 2^30 then never reaches the held-out ones."""

OWN_KEYS = ("seed", "size")
"""Settings of every generator that this environment sets itself."""

GENERATOR_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a generator or scorer was seen to raise on settings or answers it did not expect."""


class ReasoningGymSettings(QuestionSettings):
    """Which generator, and how the answer is read."""

    dataset: str = Field(min_length=1)
    """The generator's name, for example `chain_sum`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The generator's own settings."""
    answer: Literal["tag", "line"] = "tag"
    """Where a strict answer stands: between `<answer>` tags, or alone on the last line."""
    instruction: str = "Give the final answer between <answer> and </answer>."

    @model_validator(mode="after")
    def _generator_accepts(self) -> ReasoningGymSettings:
        check_generator(self.dataset, self.config)
        return self


def _library() -> dict[str, Any]:
    """The generators by name; loaded only here, because it takes a second."""
    try:
        factory = importlib.import_module("reasoning_gym.factory")
    except ImportError:
        raise TaskError("the reasoning-gym library is not installed.", "pip install 'shoal[reasoning]'") from None
    return dict(factory.DATASETS)


def _nearest(name: str, among: list[str]) -> str:
    near = difflib.get_close_matches(name, among, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def check_generator(dataset: str, config: dict[str, Any]) -> None:
    """Raise where the generator does not exist or refuses its settings.

    Raises:
        TaskError: no generator has this name, or its scorer is unsafe.
        ConfigError: a key that it has not, or a value that it refuses.
    """
    library = _library()
    if dataset not in library:
        names = sorted(library)
        raise TaskError(
            f"reasoning-gym has no generator {dataset!r}.", f"{_nearest(dataset, names)}It has: {', '.join(names)}."
        )
    generator, settings = library[dataset]
    keys = [field.name for field in dataclasses.fields(settings) if field.name not in OWN_KEYS]
    for key in config:
        if key not in keys:
            raise ConfigError(
                f"the reasoning-gym generator {dataset!r} has no setting {key!r}.",
                f"{_nearest(key, keys)}Its settings are: {', '.join(keys) or 'none'}.",
            )
    check_scorer(dataset, generator.score_answer)
    for name in _members(dataset, config):
        check_generator(name, {})
    try:
        _generator(dataset, json.dumps(config, sort_keys=True), 0)
    except GENERATOR_FAULTS as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"the reasoning-gym generator {dataset!r} refuses its settings: {reason}.") from None


def _members(dataset: str, config: dict[str, Any]) -> Iterator[str]:
    """The generators that a `composite` draws from."""
    for member in config.get("datasets", ()) if dataset == "composite" else ():
        yield str(member.get("name", "")) if isinstance(member, dict) else ""


@lru_cache(maxsize=8)
def _generator(dataset: str, config_json: str, seed: int) -> Any:
    """A generator of one chunk of items."""
    generator, settings = _library()[dataset]
    config = json.loads(config_json)
    if dataset == "composite":
        spec = importlib.import_module("reasoning_gym.composite").DatasetSpec
        members = config.get("datasets") or ()
        config["datasets"] = [spec(**{"weight": 1.0, "config": {}} | member) for member in members]
    own = settings(**config, seed=seed, size=CHUNK_ITEMS)
    if hasattr(own, "validate"):
        own.validate()
    return generator(own)


@lru_cache(maxsize=256)
def _entry(dataset: str, config_json: str, seed: int, item: int) -> dict[str, Any]:
    entry = _generator(dataset, config_json, seed)[item]
    return dict(entry)


class ReasoningGym(QuestionEnvironment):
    """Questions of one reasoning-gym generator."""

    Settings: ClassVar[type[EnvironmentSettings]] = ReasoningGymSettings
    settings: ReasoningGymSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        chunk, item = divmod(index, CHUNK_ITEMS)
        start = HELDOUT_SEED if split == "heldout" else stable_int("reasoning_gym", seed) % MAX_START
        generator_seed = start + chunk * CHUNK_ITEMS
        digest = _digest(self._item(generator_seed, item))
        return Task(env=self.name, id=f"{self.settings.dataset}-{digest}", seed=generator_seed, data={"item": item})

    def question(self, task: Task) -> str:
        return str(self._checked(task)["question"])

    def grade(self, task: Task, reply: str) -> dict[str, float]:
        entry = self._checked(task)
        asked_for = tagged(reply) if self.settings.answer == "tag" else last_line(reply)
        number = last_number(reply)
        # The loose readings: what any of the usual places of an answer is worth.
        readings = {
            asked_for,
            tagged(reply),
            last_line(reply),
            reply.strip(),
            None if number is None else f"{number:f}",
        }
        scores = {reading: self._score(reading, entry) for reading in readings if reading}
        strict, failed = scores[asked_for] if asked_for else (0.0, False)
        return {
            "strict": strict,
            "lenient": max((score for score, _ in scores.values()), default=0.0),
            "scorer_failed": float(failed),
        }

    def _item(self, seed: int, item: int) -> dict[str, Any]:
        config_json = json.dumps(self.settings.config, sort_keys=True)
        try:
            return _entry(self.settings.dataset, config_json, seed, item)
        except GENERATOR_FAULTS as error:
            reason = str(error) or type(error).__name__
            raise TaskError(f"the reasoning-gym generator {self.settings.dataset!r} failed: {reason}.") from error

    def _checked(self, task: Task) -> dict[str, Any]:
        """The entry that `task` names, if it is the one that was meant."""
        item = task.data.get("item")
        if not isinstance(item, int) or not 0 <= item < CHUNK_ITEMS or task.seed >= 2**32:
            raise TaskError(f"task {task.id} of environment {self.name!r} names no item of a generator.")
        entry = self._item(task.seed, item)
        if task.id != f"{self.settings.dataset}-{_digest(entry)}":
            raise TaskError(
                f"task {task.id} of environment {self.name!r} is another question here.",
                "Use one version of reasoning-gym on all machines, and start each with PYTHONHASHSEED=0.",
            )
        return entry

    def _score(self, answer: str, entry: dict[str, Any]) -> tuple[float, bool]:
        """The library's score in 0..1, and whether its scorer failed."""
        dataset = self.settings.dataset
        source = str(entry["metadata"].get("source_dataset", dataset)) if dataset == "composite" else dataset
        if not may_score(source, answer):
            return 0.0, False
        scorer = _generator(dataset, json.dumps(self.settings.config, sort_keys=True), 0)
        try:
            score = float(scorer.score_answer(answer, entry))
        except (*GENERATOR_FAULTS, SyntaxError):
            return 0.0, True
        return (min(1.0, max(0.0, score)), False) if math.isfinite(score) else (0.0, True)


def _digest(entry: dict[str, Any]) -> str:
    return f"{stable_int(entry['question'], entry['answer']):016x}"
