"""LoCoMo (arXiv 2402.17753): questions about conversations of many sessions, with the turns that answer them.

The published file (`locomo10.json`) is a list of samples; a sample's `conversation` has `session_N` (turns with
`speaker`, `dia_id`, `text`) and `session_N_date_time`; its `qa` has `question`, `answer`, `evidence` (turns' ids),
`category`: 1 several sessions, 2 time, 3 open knowledge, 4 one session, 5 cannot be answered (`adversarial_answer`).

Evidence recall needs no language model: a memory of all turns is asked, and the turns that it gives are compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError
from shoal.memory.public.reading import read_whole
from shoal.memory.public.scoring import locomo_f1, locomo_list_f1

SEVERAL_SESSIONS, TIME, OPEN, ONE_SESSION, ADVERSARIAL = 1, 2, 3, 4, 5
NO_ANSWER = ("no information available", "not mentioned")

_SESSION = re.compile(r"session_(\d{1,4})")
_ID = re.compile(r"D\d{1,4}:\d{1,5}")


@dataclass(frozen=True)
class Utterance:
    """One turn of a conversation."""

    id: str
    speaker: str
    text: str
    when: str
    """Of its session, as published."""

    @property
    def words(self) -> str:
        """As a memory keeps it."""
        return f"({self.when}) {self.speaker}: {self.text}"


@dataclass(frozen=True)
class Question:
    """One question about a conversation."""

    text: str
    answer: str
    evidence: tuple[str, ...]
    category: int


@dataclass(frozen=True)
class Conversation:
    """One sample."""

    id: str
    turns: tuple[Utterance, ...]
    questions: tuple[Question, ...]


class _Turn(msgspec.Struct):
    speaker: str
    dia_id: str
    text: str = ""
    blip_caption: str = ""
    """What a picture that was sent shows."""


class _Qa(msgspec.Struct):
    question: str
    category: int
    answer: str | int | float | None = None
    adversarial_answer: str | int | float | None = None
    evidence: list[str] = []


class _Sample(msgspec.Struct):
    conversation: dict[str, Any]
    qa: list[_Qa]
    sample_id: str = ""


def read(path: Path) -> list[Conversation]:
    """The conversations of a published file.

    Raises:
        ConfigError: it is not there, or not in LoCoMo's form.
    """
    return [_conversation(sample, number) for number, sample in enumerate(read_whole(path, list[_Sample]), start=1)]


def _conversation(sample: _Sample, number: int) -> Conversation:
    sessions = {int(m[1]): key for key in sample.conversation if (m := _SESSION.fullmatch(key))}
    turns: list[Utterance] = []
    try:
        for session in sorted(sessions):
            when = str(sample.conversation.get(f"session_{session}_date_time", ""))
            for turn in msgspec.convert(sample.conversation[sessions[session]], list[_Turn]):
                shown = f" [shows {turn.blip_caption}]" if turn.blip_caption else ""
                turns.append(Utterance(turn.dia_id, turn.speaker, turn.text + shown, when))
    except msgspec.ValidationError as error:
        raise ConfigError(f"sample {number}: {error}.", "Is it the published file?") from None
    if not turns:
        raise ConfigError(f"sample {number} has no sessions.", "Is it the published file?")
    questions = []
    for qa in sample.qa:
        # Some of the published ids are run together or have text around them.
        evidence = tuple(dict.fromkeys(_ID.findall(" ".join(qa.evidence))))
        answer = qa.adversarial_answer if qa.category == ADVERSARIAL else qa.answer
        questions.append(Question(qa.question, "" if answer is None else str(answer), evidence, qa.category))
    return Conversation(sample.sample_id or str(number), tuple(turns), tuple(questions))


def score(question: Question, answer: str) -> float:
    """An answer's mark by the paper's rule for the question's category."""
    if question.category == ADVERSARIAL:
        return float(any(words in answer.lower() for words in NO_ANSWER))
    right = question.answer.partition(";")[0].strip() if question.category == OPEN else question.answer
    return locomo_list_f1(answer, right) if question.category == SEVERAL_SESSIONS else locomo_f1(answer, right)


def with_evidence(conversation: Conversation) -> Sequence[Question]:
    """The questions for which turns are named that the conversation has."""
    known = {turn.id for turn in conversation.turns}
    return [q for q in conversation.questions if q.evidence and set(q.evidence) <= known]
