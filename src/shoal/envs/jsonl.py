"""Questions and answers from a JSON Lines file: GSM8K's format, plain answers, or multiple choice.

Each line is one row (`rows`). Held out are the questions of a second file, or those that a stable hash of their text
picks.

Invariant: a file that changes is read again; what is read is bounded by line and by lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shoal.envs.base import EnvironmentSettings, Split
from shoal.envs.rows import Row, RowEnvironment, RowSettings, distinct, one_side, row_of
from shoal.errors import TaskError

MAX_LINE_CHARS = 1 << 20
MAX_ROWS = 5_000_000

File = tuple[Path, tuple[int, int]]
"""A path with the file's (time, size), so that a changed file is never served from a cache."""


class JsonLinesSettings(RowSettings):
    """Where the questions are."""

    path: str = Field(min_length=1)
    """The file; `~` and variables such as `$SHOAL_DATA` are expanded."""
    heldout_path: str | None = None
    """A second file to evaluate on; without one, a share of the first is held out."""


def _rows(path: Path, settings: JsonLinesSettings) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where} is not JSON: {error}.") from None
        if not isinstance(record, dict):
            raise TaskError(
                f"{where} is not a JSON object.", 'Each line looks like {"question": "...", "answer": "..."}.'
            )
        yield row_of(record, settings, where)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers, within the limits."""
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(MAX_LINE_CHARS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARS or number > MAX_ROWS:
                    raise TaskError(f"{path}, line {number}: over {MAX_LINE_CHARS} characters or {MAX_ROWS} lines.")
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=8)
def _read(file: File, settings: JsonLinesSettings) -> tuple[Row, ...]:
    """The distinct questions of a file, in its order."""
    path, _ = file
    rows = distinct(_rows(path, settings))
    if not rows:
        raise TaskError(f"{path} holds no questions.")
    return rows


def _locate(name: str) -> File:
    """A file's path and its (time, size); raises `TaskError` where there is none."""
    path = Path(os.path.expandvars(name)).expanduser().absolute()
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return path, (status.st_mtime_ns, status.st_size)


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> TaskError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
    return TaskError(f"the question file {path} cannot be read: {reason}.", "Check `path` and `heldout_path`.")


@lru_cache(maxsize=16)
def _split(files: tuple[File, ...], settings: JsonLinesSettings, split: Split) -> tuple[Row, ...]:
    rows, *second = (_read(file, settings) for file in files)
    return one_side(rows, second[0] if second else None, settings.heldout_fraction, split)


class JsonLines(RowEnvironment):
    """Questions from a file."""

    Settings: ClassVar[type[EnvironmentSettings]] = JsonLinesSettings
    settings: JsonLinesSettings

    def rows(self, split: Split) -> tuple[Row, ...]:
        names = (self.settings.path, self.settings.heldout_path)
        chosen = _split(tuple(_locate(name) for name in names if name is not None), self.settings, split)
        if not chosen:
            raise TaskError(f"environment {self.name!r} has no {split} question.", "Change heldout_fraction or a path.")
        return chosen
