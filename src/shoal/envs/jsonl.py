"""Questions and answers from a JSON Lines file: GSM8K's format, plain answers, or multiple choice.

Each line is an object with a question and an answer, under keys that the settings name; in a GSM8K answer what counts
follows `####`. Held out are the questions of a second file, or those that a stable hash of their text picks.

Invariants: a question is on one side only, however often the file repeats it (a training line whose question is also
in the held-out file is left out); an epoch of training asks every question once; a task carries its question and its
answer, so a worker needs no copy of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from shoal.envs.base import MAX_HELDOUT, EnvironmentSettings, Split, check_cursor, stable_fraction, stable_int
from shoal.envs.extract import (
    after_marker,
    choice,
    final_number,
    last_line,
    last_number,
    normalise,
    parse_number,
    tagged,
)
from shoal.envs.question import QuestionEnvironment, QuestionSettings
from shoal.errors import TaskError
from shoal.protocol.episode import Task

MAX_LINE_CHARS = 1 << 20
MAX_ROWS = 5_000_000

File = tuple[Path, tuple[int, int]]
"""A path with the file's (time, size), so that a changed file is never served from a cache."""

Grader = Literal["number", "exact", "choice"]


class JsonLinesSettings(QuestionSettings):
    """Where the questions are and how replies are graded."""

    path: str = Field(min_length=1)
    """The file; `~` and variables such as `$SHOAL_DATA` are expanded."""
    heldout_path: str | None = None
    """A second file to evaluate on; without one, a share of the first is held out."""
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share held out where there is no second file."""
    question_key: str = "question"
    answer_key: str = "answer"
    choices_key: str = "choices"
    """For `choice`: a list of texts; the answer is then a letter, an index from 0, or one of the texts."""
    grader: Grader = "number"
    """`number`: the last number counts; `exact`: the last line, normalised; `choice`: the letter or text named last."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question of a file."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{stable_int('jsonl', normalise(self.question)):016x}"


def _row(record: Any, settings: JsonLinesSettings, where: str) -> Row:
    if not isinstance(record, dict):
        raise TaskError(f"{where} is not a JSON object.", 'Each line looks like {"question": "...", "answer": "..."}.')
    for key in (settings.question_key, settings.answer_key):
        if not isinstance(record.get(key), str | int | float) or not str(record[key]).strip():
            has = ", ".join(sorted(map(str, record))[:10]) or "no key at all"
            raise TaskError(f"{where} has no {key!r}; it has {has}.", "Set question_key and answer_key to its keys.")
    question, answer = str(record[settings.question_key]).strip(), after_marker(str(record[settings.answer_key]))
    choices: tuple[str, ...] = ()
    if settings.grader == "number":
        value = parse_number(answer)
        if value is None or value.is_nan():
            raise TaskError(f"{where}: the answer {answer[:60]!r} is not a number.", 'Set grader = "exact".')
    elif settings.grader == "choice":
        listed = record.get(settings.choices_key)
        if not isinstance(listed, list) or not 2 <= len(listed) <= 26:
            raise TaskError(f"{where} has no {settings.choices_key!r} with 2 to 26 texts.", "Set choices_key.")
        choices = tuple(str(one).strip() for one in listed)
        index = int(answer) if answer.isdecimal() and answer not in choices else choice(answer, choices)
        if index is None or index >= len(choices):
            raise TaskError(f"{where}: the answer {answer[:60]!r} is none of its choices.")
        answer = chr(ord("A") + index)
    return Row(question, answer, choices)


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
    rows: dict[str, Row] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where} is not JSON: {error}.") from None
        row = _row(record, settings, where)
        rows.setdefault(row.id, row)
    if not rows:
        raise TaskError(f"{path} holds no questions.")
    return tuple(rows.values())


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
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    Random(stable_int("jsonl", seed, epoch)).shuffle(order)
    return tuple(order)


@lru_cache(maxsize=16)
def _split(files: tuple[File, ...], settings: JsonLinesSettings, split: Split) -> tuple[Row, ...]:
    """One side of the file(s), in an order that depends on the questions' texts alone."""
    rows, *second = (_read(file, settings) for file in files)
    fraction = settings.heldout_fraction
    if not second:
        chosen = [row for row in rows if (stable_fraction("side", row.id) < fraction) == (split == "heldout")]
    elif split == "heldout":
        chosen = list(second[0])
    else:
        known = {row.id for row in second[0]}
        chosen = [row for row in rows if row.id not in known]
    return tuple(sorted(chosen, key=lambda row: row.id))


class JsonLines(QuestionEnvironment):
    """Questions from a file."""

    Settings: ClassVar[type[EnvironmentSettings]] = JsonLinesSettings
    settings: JsonLinesSettings

    def rows(self, split: Split) -> tuple[Row, ...]:
        """The distinct questions of one split.

        Raises:
            TaskError: a file cannot be read, a line is not a question and an answer, or the split is empty.
        """
        names = (self.settings.path, self.settings.heldout_path)
        chosen = _split(tuple(_locate(name) for name in names if name is not None), self.settings, split)
        if not chosen:
            raise TaskError(f"environment {self.name!r} has no {split} question.", "Change heldout_fraction or a path.")
        return chosen

    def _as_task(self, row: Row) -> Task:
        data: dict[str, Any] = {"question": row.question, "answer": row.answer}
        if row.choices:
            data["choices"] = list(row.choices)
        return Task(env=self.name, id=row.id, seed=0, data=data)

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        rows = self.rows(split)
        epoch, place = divmod(index, len(rows))
        return self._as_task(rows[_order(len(rows), seed, epoch)[place]])

    def heldout(self, limit: int | None = None) -> list[Task]:
        return [self._as_task(row) for row in self.rows("heldout")[: MAX_HELDOUT if limit is None else limit]]

    def question(self, task: Task) -> str:
        row = self._row(task)
        lines = [f"{chr(ord('A') + i)}) {text}" for i, text in enumerate(row.choices)]
        return "\n".join([row.question, *lines])

    def grade(self, task: Task, reply: str) -> dict[str, float]:
        row = self._row(task)
        if self.settings.grader == "number":
            gold = parse_number(row.answer)
            return {"strict": float(final_number(reply) == gold), "lenient": float(last_number(reply) == gold)}
        if self.settings.grader == "choice":
            right = float(choice(tagged(reply) or reply, row.choices) == ord(row.answer) - ord("A"))
            return {"strict": right, "lenient": right}
        gold_text, line = normalise(row.answer), normalise(tagged(reply) or last_line(reply))
        return {"strict": float(line == gold_text), "lenient": float(f" {gold_text} " in f" {line} ")}

    def _row(self, task: Task) -> Row:
        question, answer, choices = (task.data.get(key) for key in ("question", "answer", "choices"))
        listed = choices if isinstance(choices, list | tuple) else ()
        if not isinstance(question, str) or not isinstance(answer, str) or not answer:
            raise TaskError(f"task {task.id} of environment {self.name!r} carries no question and answer.")
        if self.settings.grader == "choice" and not 0 <= ord(answer[0]) - ord("A") < len(listed):
            raise TaskError(f"task {task.id} of environment {self.name!r} carries no choices.")
        if self.settings.grader == "number" and parse_number(answer) is None:
            raise TaskError(f"task {task.id} of environment {self.name!r} has an answer that is no number.")
        return Row(question, answer, tuple(str(one) for one in listed))
