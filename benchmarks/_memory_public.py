"""Public sets under `SHOAL_DATA`: what a memory finds of the evidence (no model), and answers where a model is named.

    locomo10.json                     LoCoMo
    hotpot_dev_distractor_v1.json     HotpotQA
    shared_task_dev.jsonl             FEVER (and wiki-pages/, for its sentences)

A memory here is this room's retrieval with equal weights: each turn, or sentence, is an entry. Every question's raw
output is kept in `public.jsonl` in the folder, since figures like these are disputed.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.errors import TaskError
from shoal.memory.embedding import HashedEmbedder
from shoal.memory.public import fever, hotpot, locomo
from shoal.memory.public.scoring import Fact, recall_of
from shoal.memory.recall import compose
from shoal.memory.records import MAX_ENTRY_CHARS, Entry, Provenance
from shoal.protocol.chat import Message
from shoal.protocol.sampling import SampleRequest, SamplingParams
from shoal.rollout.host import model_cache

CUTS = (5, 10, 25)
"""Recall is given at these numbers of retrieved turns or sentences."""

SHOWN = 10
"""What an answering model is shown."""

NOTE_TOKENS = 900
ANSWER = SamplingParams(max_tokens=32, temperature=0.0)
FILES = {
    "locomo": "locomo10.json",
    "hotpot": "hotpot_dev_distractor_v1.json",
    "fever": "shared_task_dev.jsonl",
}


class Found:
    """The texts most like a question, best first."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._embedder = HashedEmbedder()
        self._vectors = self._embedder.embed(texts)

    def __call__(self, question: str, count: int) -> list[int]:
        likeness = self._vectors @ self._embedder.embed([question])[0]
        return [int(i) for i in np.argsort(-likeness, kind="stable")[:count]]


class Answerer:
    """A model that answers from notes; `async with`."""

    def __init__(self, model: str) -> None:
        self.engine = LocalEngine(
            resolve(model, model_cache()), context_tokens=2048, max_sequences=8, cache_tokens=16384
        )

    async def answer(self, question: str, texts: Sequence[str], how: str) -> str:
        entries = [
            Entry(text=text[:MAX_ENTRY_CHARS], family="public", provenance=Provenance(rule="manual"))
            for text in texts
            if text
        ]
        tokenizer = self.engine.tokenizer
        block = compose(entries, max_tokens=NOTE_TOKENS, count_tokens=lambda text: len(tokenizer.encode(text))).text
        said = [Message(role="user", content=f"{block}\n\n{question}\n{how}")]
        request = SampleRequest(prompt_ids=tuple(tokenizer.prompt(said)), params=ANSWER)
        return (await self.engine.sample(request)).text.strip()


def public(rows: list[dict[str, Any]], *, questions: int, model: str, folder: Path | None) -> dict[str, float]:
    """Measure on the sets that are there.

    Args:
        questions: of each set, at most; 0 for all.
        model: answers; empty: evidence recall alone.

    Raises:
        TaskError: none of the sets is there.
    """
    data = Path(os.environ.get("SHOAL_DATA", ".")).expanduser()
    there = {name: path for name, file in FILES.items() if (path := data / file).is_file()}
    if not there:
        names = ", ".join(FILES.values())
        raise TaskError(f"None of {names} is in {data}.", "Set SHOAL_DATA to the folder that holds them.")
    kept: list[dict[str, Any]] = []
    headline = asyncio.run(_measure(there, questions, model, rows, kept))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "public.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    return headline


async def _measure(
    there: dict[str, Path], questions: int, model: str, rows: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    headline: dict[str, float] = {}
    answerer = Answerer(model) if model else None
    try:
        if "locomo" in there:
            headline |= await locomo_figures(there["locomo"], questions, answerer, rows, kept)
        if "hotpot" in there:
            headline |= await hotpot_figures(there["hotpot"], questions, answerer, rows, kept)
        if "fever" in there and answerer is not None:
            headline |= await fever_figures(there["fever"], questions, answerer, rows, kept)
    finally:
        if answerer is not None:
            await answerer.engine.close()
    return headline


async def locomo_figures(
    path: Path, most: int, answerer: Answerer | None, rows: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    recalls: dict[int, list[float]] = defaultdict(list)
    marks: dict[int, list[float]] = defaultdict(list)
    for conversation in locomo.read(path):
        find = Found([turn.words for turn in conversation.turns])
        asked = locomo.with_evidence(conversation)
        for question in asked[:most] if most else asked:
            best = find(question.text, max(CUTS))
            names = [conversation.turns[i].id for i in best]
            for cut in CUTS:
                recalls[cut].append(recall_of(names[:cut], question.evidence))
            row: dict[str, Any] = {
                "set": "locomo",
                "question": question.text,
                "evidence": question.evidence,
                "found": names,
            }
            if answerer is not None:
                texts = [conversation.turns[i].words for i in best[:SHOWN]]
                said = await answerer.answer(question.text, texts, "Answer in a few words.")
                marks[question.category].append(locomo.score(question, said))
                row |= {"answer": said, "right": question.answer, "mark": marks[question.category][-1]}
            kept.append(row)
    for cut in CUTS:
        count = len(recalls[cut])
        rows.append({"part": "public", "case": f"LoCoMo, {cut} turns", "count": count, "recall": fmean(recalls[cut])})
    for category, found in sorted(marks.items()):
        rows.append({"part": "public", "case": f"LoCoMo, category {category}", "count": len(found), "f1": fmean(found)})
    return {f"locomo_evidence_recall_at_{cut}": fmean(recalls[cut]) for cut in CUTS}


async def hotpot_figures(
    path: Path, most: int, answerer: Answerer | None, rows: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    recalls: dict[int, list[float]] = defaultdict(list)
    marks: list[hotpot.Marks] = []
    for question in hotpot.read(path, most):
        sentences = question.sentences
        facts: list[Fact] = list(sentences)
        find = Found([f"{title}: {sentences[title, n]}" for title, n in facts])
        best = [facts[i] for i in find(question.question, max(CUTS))]
        right = {f"{title}#{n}" for title, n in question.supporting_facts}
        for cut in CUTS:
            recalls[cut].append(recall_of((f"{title}#{n}" for title, n in best[:cut]), right))
        if answerer is not None:
            texts = [f"{title}: {sentences[title, n]}" for title, n in best[:SHOWN]]
            said = await answerer.answer(question.question, texts, "Answer in a few words.")
            marks.append(hotpot.score(question, said, best[: len(question.supporting_facts)]))
            row = {"set": "hotpot", "id": question.id, "answer": said, "right": question.answer, "found": best}
            kept.append(row)
    for cut in CUTS:
        count = len(recalls[cut])
        rows.append({"part": "public", "case": f"HotpotQA, {cut}", "count": count, "recall": fmean(recalls[cut])})
    headline = {f"hotpot_fact_recall_at_{cut}": fmean(recalls[cut]) for cut in CUTS}
    if marks:
        headline |= {
            "hotpot_em": fmean(mark.em for mark in marks),
            "hotpot_f1": fmean(mark.answer.f1 for mark in marks),
            "hotpot_joint_f1": fmean(mark.joint_f1 for mark in marks),
        }
    return headline


async def fever_figures(
    path: Path, most: int, answerer: Answerer, rows: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    claims = fever.read(path, most)
    pages = {page for claim in claims for whole in claim.sets for page, _ in whole}
    known = fever.sentences(path.parent / "wiki-pages", pages)
    facts = list(known)
    find = Found([f"{page}: {known[page, n]}" for page, n in facts]) if facts else None
    marks: list[fever.Marks] = []
    for claim in claims:
        best = [facts[i] for i in find(claim.claim, SHOWN)] if find is not None else []
        texts = [f"{page}: {known[page, n]}" for page, n in best]
        how = "Is the claim supported by the notes? Answer with SUPPORTS, REFUTES or NOT ENOUGH INFO."
        said = await answerer.answer(f"Claim: {claim.claim}", texts, how)
        label = next((one for one in fever.LABELS if one in said.upper()), fever.LABELS[-1])
        marks.append(fever.score(claim, label, best))
        kept.append({"set": "fever", "id": claim.id, "answer": said, "label": label, "right": claim.label})
    accuracy, score = fmean(mark.label for mark in marks), fmean(mark.fever for mark in marks)
    rows.append({"part": "public", "case": "FEVER", "count": len(marks), "label": accuracy, "fever": score})
    return {"fever_label_accuracy": accuracy, "fever_score": score}
