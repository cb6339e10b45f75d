"""From contexts to candidates: what a finished run may teach, and why a candidate is refused before any replay.

Rules: `worked_example` (a rewarded run's question and acts), `correction` (of two runs of one task, what the
better one did where the worse one differed). Whoever has a model that can write insights calls `candidate` with its
text. Everything passes `screen`.

Invariants: recalled text never enters a candidate; a candidate names the context it came from and carries its scope;
the task it came from is no evidence for it (`admission.evidence`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.memory.recall import NEXT_ACT
from shoal.memory.records import MAX_ENTRY_CHARS, Context, Entry, Provenance, Rule
from shoal.memory.screening import (
    RECALLED_CLOSE,
    RECALLED_OPEN,
    AnswerFinder,
    find_order,
    is_recalled,
    normalise,
    shingles,
    without_recalled,
)

MIN_REWARD = 0.5
"""A run that earned less is no example."""

LONG_ANSWER_CHARS = 4
"""An entry may not hold an answer of at least this many characters of a sibling task; shorter ones meet by chance."""

DUPLICATE_SHARE = 0.9
"""Two texts of one family and scope with this share of shingles in common (Jaccard) are one entry."""


@dataclass(frozen=True)
class Refusal:
    """Why a text did not become a candidate; refused ones are counted, never kept."""

    reason: str
    text: str


def candidate(
    text: str,
    context: Context,
    rule: Rule,
    *,
    sibling_answers: Iterable[Sequence[str]] = (),
    node: str = "",
) -> Entry | Refusal:
    """An entry of `text`, drawn from `context`, or why it cannot be one.

    Args:
        sibling_answers: for tasks of the same family, their right answers.
    """
    shown = normalise(without_recalled(text))[:MAX_ENTRY_CHARS].rstrip()
    reason = screen(shown, recalled=context.recalled, sibling_answers=sibling_answers)
    # What normalising removes is evidence too.
    reason = reason or (f"order to the reader: {order}" if (order := find_order(text)) else "")
    if reason:
        return Refusal(reason, shown)
    entry = Entry(
        text=shown,
        family=context.task.env,
        scope=context.scope,
        source_task=context.task.id,
        provenance=Provenance(rule=rule, context=context.id, node=node),
    )
    entry.check()
    return entry


def screen(text: str, *, recalled: Iterable[str] = (), sibling_answers: Iterable[Sequence[str]] = ()) -> str:
    """Why `text` may not become a memory; empty where it may."""
    if not text:
        return "empty"
    if RECALLED_OPEN in text or RECALLED_CLOSE in text or is_recalled(text, recalled):
        return "recalled text"
    if order := find_order(text):
        return f"order to the reader: {order}"
    finder = AnswerFinder(text)
    for answers in sibling_answers:
        long_ones = [answer for answer in answers if len(answer.strip()) >= LONG_ANSWER_CHARS]
        if finder.holds(long_ones):
            return "holds a sibling task's answer"
    return ""


def worked_example(context: Context, *, node: str = "") -> Entry | Refusal:
    """What was asked and the acts that earned the reward."""
    if context.reward < MIN_REWARD or not context.actions:
        return Refusal("not rewarded", "")
    asked = next((m.content for m in reversed(context.messages) if m.role == "user"), "")
    acts = NEXT_ACT.join(without_recalled(act) for act in context.actions)
    text = f"Task: {without_recalled(asked)}\nWhat worked: {acts}"
    return candidate(text, context, "worked_example", node=node)


def correction(worse: Context, better: Context, *, node: str = "") -> Entry | Refusal:
    """What the better of two runs of one task did where they parted."""
    if worse.task != better.task or better.reward <= worse.reward:
        return Refusal("no correction", "")
    pairs = zip(worse.actions, better.actions, strict=False)
    parted = next(((bad, good) for bad, good in pairs if bad != good), None)
    if parted is None:
        return Refusal("no correction", "")
    asked = next((m.content for m in reversed(better.messages) if m.role == "user"), "")
    bad, good = (without_recalled(act) for act in parted)
    return candidate(f"Task: {without_recalled(asked)}\nInstead of: {bad}\nDo: {good}", better, "correction", node=node)


def same_words(first: str, second: str) -> bool:
    """Whether two texts say the same but for a few words."""
    a, b = shingles(first), shingles(second)
    return bool(a | b) and len(a & b) >= DUPLICATE_SHARE * len(a | b)
