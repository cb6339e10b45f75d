"""The text that a drafter learns from: written once, by the model itself, and gone on with after a kill."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from engine_cases import local

from shoal.engine.local import LocalEngine
from shoal.engine.speculation.writing import TargetText, Writing, missing, write, written
from shoal.errors import RecordError
from shoal.protocol.chat import Message
from shoal.protocol.codec import to_json

GREEDY = Writing(tokens=60, max_tokens=12, context_tokens=128, temperature=0.0, seed=0, in_flight=4)
PROMPTS = [[Message(role="user", content=f"the {n}")] for n in range(8)] + [[Message(role="user", content="a" * 400)]]


async def test_writing_stops_when_there_is_enough_and_goes_on_where_it_stopped(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    said: list[str] = []
    async with LocalEngine(local(plain), dtype="fp32", device="cpu", max_sequences=4, context_tokens=128) as engine:
        whole: list[TargetText] = []
        await write(engine, PROMPTS, path, whole, GREEDY, said.append)
        assert said == ["1 prompts left out: longer than the context"]
        tokens = sum(len(text.token_ids) for text in whole)
        assert 60 <= tokens < 60 + GREEDY.in_flight * GREEDY.max_tokens
        assert written(path) == whole
        # A kill between two lines, and one amid a line.
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:7])
        rest = written(path)
        assert rest == whole[:2] and path.read_bytes() == b"".join(lines[:2])
        await write(engine, PROMPTS, path, rest, GREEDY, said.append)
    assert len({text.index for text in rest}) == len(rest), "no prompt was answered twice"
    by_index = {text.index: text for text in whole}
    assert all(by_index.get(text.index, text) == text for text in rest), "greedy answers are the same"
    assert written(path) == rest


def test_prompts_are_asked_again_only_where_answers_differ() -> None:
    texts = [TargetText(1, (5,), (6,))]
    assert list(missing(texts, 4, GREEDY)) == [0, 2, 3]
    warm = Writing(60, 12, 128, 1.0, 0, 4)
    assert list(islice(missing(texts, 2, warm), 4)) == [0, 2, 3, 4]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(to_json(TargetText(0, (1,), (2,))).replace(b"[2]", b"[-2]") + b"\n")
    with pytest.raises(RecordError, match="negative"):
        written(path)
