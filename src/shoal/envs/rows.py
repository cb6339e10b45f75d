"""Questions and answers that somebody collected: what a row is, which side it is on, and how replies are graded.

A row is an object with a question and an answer, under keys that the settings name; in a GSM8K answer what counts
follows `####`. Where the rows are is the subclass's matter: `jsonl` reads files, `dataset` the Hugging Face Hub's.

Invariants: a question is on one side only, however often it is repeated (a training row whose question is also in the
held-out rows is left out); an epoch of training asks every question once; a task carries its question and its answer,
so a worker needs no copy of the rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
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

Grader = Literal["number", "exact", "choice"]


class RowSettings(QuestionSettings):
    """Under which keys questions and answers are, and how replies are graded."""

    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share held out where nothing else says which questions are."""
    question_key: str = "question"
    """A key, or a way through several: `paragraph.question`."""
    answer_key: str = "answer"
    choices_key: str = "choices"
    """For `choice`: a list of texts; the answer is then a letter, an index from 0, or one of the texts."""
    labels_key: str = ""
    """For `choice`: a list of what the choices are called, where the answer is one of these."""
    grader: Grader = "number"
    """`number`: the last number counts; `exact`: the last line, normalised; `choice`: the letter or text named last."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{stable_int('jsonl', normalise(self.question)):016x}"


def row_of(record: dict[str, Any], settings: RowSettings, where: str) -> Row:
    """One record as a row; raises `TaskError`, which names the place, where it is none."""
    texts = []
    for key in (settings.question_key, settings.answer_key):
        value = _at(record, key)
        if not isinstance(value, str | int | float) or not str(value).strip():
            has = ", ".join(sorted(map(str, record))[:10]) or "no key at all"
            raise TaskError(f"{where} has no {key!r}; it has {has}.", "Set question_key and answer_key to its keys.")
        texts.append(str(value))
    question, answer = texts[0].strip(), after_marker(texts[1])
    choices: tuple[str, ...] = ()
    if settings.grader == "number":
        value = parse_number(answer)
        if value is None or value.is_nan():
            raise TaskError(f"{where}: the answer {answer[:60]!r} is not a number.", 'Set grader = "exact".')
    elif settings.grader == "choice":
        listed = _at(record, settings.choices_key)
        if not isinstance(listed, list) or not 2 <= len(listed) <= 26:
            raise TaskError(f"{where} has no {settings.choices_key!r} with 2 to 26 texts.", "Set choices_key.")
        choices = tuple(str(one).strip() for one in listed)
        labels = _at(record, settings.labels_key) if settings.labels_key else None
        index = _index(answer, choices, labels)
        if index is None or index >= len(choices):
            raise TaskError(f"{where}: the answer {answer[:60]!r} is none of its choices.")
        answer = chr(ord("A") + index)
    return Row(question, answer, choices)


def _at(record: Any, key: str) -> Any:
    if isinstance(record, dict) and key in record:
        return record[key]
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _index(answer: str, choices: tuple[str, ...], labels: Any) -> int | None:
    """Which of `choices` an answer means."""
    if labels is not None:
        names = [str(label) for label in labels] if isinstance(labels, list) else []
        return names.index(answer) if answer in names else None
    return int(answer) if answer.isdecimal() and answer not in choices else choice(answer, choices)


def distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each question once, as it was first asked."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.id, row)
    return tuple(found.values())


def one_side(
    rows: tuple[Row, ...], second: tuple[Row, ...] | None, heldout_fraction: float, split: Split
) -> tuple[Row, ...]:
    """One side, in an order that depends on the questions' texts alone.

    Args:
        rows: those to train on, and to hold out from where there are no others.
        second: those that are held out.
    """
    if second is None:
        chosen = [row for row in rows if (stable_fraction("side", row.id) < heldout_fraction) == (split == "heldout")]
    elif split == "heldout":
        chosen = list(second)
    else:
        known = {row.id for row in second}
        chosen = [row for row in rows if row.id not in known]
    return tuple(sorted(chosen, key=lambda row: row.id))


@lru_cache(maxsize=16)
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    Random(stable_int("jsonl", seed, epoch)).shuffle(order)
    return tuple(order)


class RowEnvironment(QuestionEnvironment):
    """An environment that asks rows."""

    Settings: ClassVar[type[EnvironmentSettings]] = RowSettings
    settings: RowSettings

    @abstractmethod
    def rows(self, split: Split) -> tuple[Row, ...]:
        """The distinct questions of one split, at least one; cheap to ask for again.

        Raises:
            TaskError: they cannot be read, one is no question with an answer, or there is none.
        """

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
