"""Questions and answers from a data set of the Hugging Face Hub, or from a folder or file in its formats.

    [envs.gsm]
    type = "dataset"
    settings = { name = "openai/gsm8k", subset = "main", train_split = "train", heldout_split = "test" }

The `datasets` library finds, fetches and caches it. Which columns are question and answer, and how replies are graded:
`rows`.

Invariants: no code of a data set runs, and no reader is used but those of `READERS` (none of which unpickles); only the
columns that are asked for are read; what was fetched once is used without the hub.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import httpx
from pydantic import Field

from shoal.engine import hub
from shoal.envs.base import EnvironmentSettings, Split
from shoal.envs.rows import Row, RowEnvironment, RowSettings, distinct, one_side, row_of
from shoal.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

log = logging.getLogger("shoal.envs")

READERS = ("arrow", "cache", "csv", "json", "parquet")
"""What reads a data set's files; `cache`, what was read before."""

SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
"""A single file's reader."""

MAX_ROWS = 5_000_000
MAX_REASON_CHARS = 300


class DatasetSettings(RowSettings):
    """Which data set, and which of its parts."""

    name: str = Field(min_length=1)
    """`owner/name` on the hub, or a folder or file (Parquet, JSON Lines, CSV, Arrow); `~` and variables such as
    `$SHOAL_DATA` are expanded."""
    subset: str = ""
    """Which configuration of it, where it has several."""
    revision: str = ""
    """A branch, tag or commit on the hub; a commit makes a run repeatable."""
    train_split: str = "train"
    heldout_split: str = ""
    """A second split to evaluate on; without one, a share of the first is held out."""
    skip_unfit: bool = False
    """Leave out rows that are no question with an answer of the grader's kind, instead of refusing the data set."""


class DatasetQuestions(RowEnvironment):
    """Questions from a data set."""

    Settings: ClassVar[type[EnvironmentSettings]] = DatasetSettings
    settings: DatasetSettings

    def rows(self, split: Split) -> tuple[Row, ...]:
        chosen = _side(self.settings, split)
        if not chosen:
            raise TaskError(
                f"environment {self.name!r} has no {split} question.", "Change heldout_fraction or a split."
            )
        return chosen


@lru_cache(maxsize=16)
def _side(settings: DatasetSettings, split: Split) -> tuple[Row, ...]:
    """One side, read once in a process."""
    second = _read(settings, settings.heldout_split) if settings.heldout_split else None
    return one_side(_read(settings, settings.train_split), second, settings.heldout_fraction, split)


@lru_cache(maxsize=8)
def _read(settings: DatasetSettings, split: str) -> tuple[Row, ...]:
    """The distinct questions of a split, in its order."""
    where = f"data set {settings.name!r}, split {split!r}"
    table = _columns(_loaded(settings, split), settings, where)
    if len(table) > MAX_ROWS:
        raise TaskError(
            f"{where} has {len(table)} rows, over {MAX_ROWS}.", f"Name a part: train_split = '{split}[:1%]'."
        )
    rows, first_unfit, num_unfit = [], None, 0
    for number, record in enumerate(table):
        try:
            rows.append(row_of(record, settings, f"{where}, row {number}"))
        except TaskError as error:
            if not settings.skip_unfit:
                raise TaskError(error.problem, f"{error.remedy} Or set skip_unfit = true.".strip()) from None
            first_unfit, num_unfit = first_unfit or error, num_unfit + 1
    if not rows:
        raise first_unfit or TaskError(f"{where} holds no questions.")
    if first_unfit:
        log.warning("%s: %d of %d rows left out; the first: %s", where, num_unfit, len(table), first_unfit.problem)
    return distinct(rows)


def _columns(table: Dataset, settings: DatasetSettings, where: str) -> Dataset:
    """Those that rows are made of: no other is decoded."""
    wanted = [settings.question_key, settings.answer_key]
    if settings.grader == "choice":
        wanted += [key for key in (settings.choices_key, settings.labels_key) if key]
    found = {key if key in table.column_names else key.partition(".")[0]: key for key in wanted}
    missing = [key for column, key in found.items() if column not in table.column_names]
    if missing:
        has = ", ".join(table.column_names[:20])
        raise TaskError(f"{where} has no column {missing[0]!r}; it has {has}.", "Set question_key and answer_key.")
    return table.select_columns(list(found))


def _loaded(settings: DatasetSettings, split: str) -> Dataset:
    """The split as a table.

    Raises:
        TaskError: the data set, the subset or the split is not to be had; says what to do.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "an environment of type 'dataset' needs the package datasets, which is not installed.",
            "Install it: pip install 'shoal[datasets]'.",
        ) from None
    path = Path(os.path.expandvars(settings.name)).expanduser()
    is_local = path.exists()
    reachable = is_local or hub.answers()
    try:
        with _without_hub(is_local or not reachable):
            builder = _builder(settings, path if is_local else None)
            reader = type(builder).__module__.rpartition(".")[2]
            if reader not in READERS:
                raise TaskError(
                    f"data set {settings.name!r} would be read by the reader '{reader}'.",
                    f"Those that are allowed: {', '.join(READERS)}.",
                )
            builder.download_and_prepare()
            found = builder.as_dataset(split=split)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        # A failed conversion says only that it failed; its cause says why.
        failed = isinstance(error, datasets.exceptions.DatasetGenerationError)
        error = error.__cause__ if failed and isinstance(error.__cause__, Exception) else error
        raise _refused(settings, error, is_local=is_local, reachable=reachable) from None
    assert isinstance(found, datasets.Dataset)
    return found


def _builder(settings: DatasetSettings, local: Path | None) -> DatasetBuilder:
    import datasets

    name = settings.subset or None
    if local is None:
        return datasets.load_dataset_builder(settings.name, name, revision=settings.revision or None)
    if local.is_dir():
        return datasets.load_dataset_builder(str(local.absolute()), name)
    if local.suffix not in SUFFIXES:
        raise TaskError(f"{local} is no file of a data set.", f"Its name must end in {', '.join(SUFFIXES)}.")
    return datasets.load_dataset_builder(SUFFIXES[local.suffix], data_files=str(local.absolute()))


def _refused(settings: DatasetSettings, error: Exception, *, is_local: bool, reachable: bool) -> TaskError:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[0][:MAX_REASON_CHARS].rstrip(".")
    if reachable and not is_local:
        return TaskError(
            f"data set {settings.name!r} cannot be had from the Hugging Face Hub: {reason}.",
            "Check name, subset, revision and splits; for a private or gated one log in with `hf auth login`.",
        )
    if is_local or not isinstance(error, ConnectionError):
        return TaskError(f"data set {settings.name!r} cannot be read: {reason}.", "Check name, subset and splits.")
    return TaskError(
        f"data set {settings.name!r} is no folder or file here, the Hugging Face Hub does not answer, and it was not "
        f"fetched before.",
        f"Connect to the internet; or, on a machine that is connected, run `hf download --repo-type dataset "
        f"{settings.name} --local-dir FOLDER`, copy FOLDER here and set name to it.",
    )


@contextmanager
def _without_hub(yes: bool) -> Iterator[None]:
    """`datasets` told that there is no hub: it would retry for minutes before it looks into its cache."""
    from datasets import config

    before: Any = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or yes
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
