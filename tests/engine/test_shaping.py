"""Grammars, biases, penalties, alternatives; and a stream's text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import END, IM_END, VOCABULARY, Caller, make_batcher
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.grammar import MAX_GRAMMAR_BYTES, Grammars
from shoal.engine.sampling import likeliest, sample
from shoal.engine.shaping import PLAIN, Shaper, Shaping
from shoal.engine.text_stream import TextStream
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError
from shoal.protocol.sampling import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(plain: Path) -> Tokenizer:
    return Tokenizer(plain)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer.hf, tokenizer.end_ids)


def drawn_with(plain: Path, make: Any, *, number: int = 6, max_tokens: int = 120, **params: Any) -> list[Any]:
    """Completions drawn together, one seed each, beside one that asks for nothing."""
    batcher = make_batcher(plain)
    caller = Caller(batcher)
    for seed in range(number):
        caller.ask([5, 6, 7], max_tokens=max_tokens, seed=seed, **params)
        caller.running[-1].shaper = make().shaper()
    caller.ask([5, 6, 7], max_tokens=5, seed=0)
    done = caller.run()
    return [done[index] for index in range(number)]


def test_a_schema_holds_for_every_completion_that_ends(plain: Path, grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["n", "tags"],
        "additionalProperties": False,
    }
    done = drawn_with(plain, lambda: Shaping(grammars.json_schema(schema)), temperature=1.3)
    assert sum(completion.finish == "stop" for completion in done) >= 3
    for completion in done:
        assert all(logprob <= 0 for logprob in completion.logprobs)
        if completion.finish == "stop":
            found = json.loads(completion.text)
            assert set(found) == {"n", "tags"} and isinstance(found["n"], int) and set(found["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("pattern", ["[ab]{3}", "(yes|no)", "x?y+z"])
def test_a_regular_expression_holds(pattern: str, plain: Path, grammars: Grammars) -> None:
    for completion in drawn_with(plain, lambda: Shaping(grammars.regex(pattern))):
        if completion.finish == "stop":
            assert re.fullmatch(pattern, completion.text), completion.text


def test_a_constrained_log_probability_is_that_of_what_was_allowed(plain: Path, grammars: Grammars) -> None:
    for completion in drawn_with(plain, lambda: Shaping(grammars.regex("q")), number=2):
        assert completion.text == "q"
        assert completion.logprobs[0] == pytest.approx(0, abs=1e-6)  # nothing else could be drawn


@pytest.mark.parametrize("grammar", [{"type": "banana"}, {"$ref": "#/nowhere"}])
def test_a_schema_that_is_none_is_refused(grammar: dict[str, Any], grammars: Grammars) -> None:
    with pytest.raises(ConfigError):
        grammars.json_schema(grammar)
    with pytest.raises(ConfigError):
        grammars.regex("((")
    with pytest.raises(ConfigError):
        grammars.lark("start: nothing_known")
    with pytest.raises(ConfigError, match="too large"):
        grammars.regex("a" * (MAX_GRAMMAR_BYTES + 1))


def test_penalties_are_openais() -> None:
    shaper = Shaper(Shaping(None, {3: 1.5}, presence_penalty=0.5, frequency_penalty=0.25))
    for token in (1, 1, 2):
        shaper.took(token)
    logits = torch.zeros(5)
    shaper.apply(logits)
    assert logits.tolist() == [0.0, -1.0, -0.75, 1.5, 0.0]
    assert PLAIN.shaper() is None


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=40),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0, 3]),
    st.floats(0, 1, exclude_max=True),
)
def test_alternatives_agree_with_what_is_drawn(
    logits: list[float], temperature: float, top_k: int, uniform: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    row = torch.tensor(logits)
    (token,), (logprob,) = sample(row[None], [params], [uniform])
    top = likeliest(row, params, len(logits))
    assert dict(top)[token] == pytest.approx(logprob, abs=1e-4)
    assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    assert sum(torch.tensor([p for _, p in top]).exp()) == pytest.approx(1, abs=1e-4)


@given(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=60),
    st.lists(st.sampled_from(["a", "the", "é", "\n", "lo"]), max_size=2),
)
def test_a_streams_pieces_are_the_text(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    stream = TextStream(tokenizer, tuple(stops))
    text = ""
    drawn: list[int] = []
    for token in ids:
        drawn.append(token)
        text += stream.push(token)
        assert tokenizer.visible(ids, stops).startswith(text) or tokenizer.visible(drawn, stops).startswith(text)
        if tokenizer.ends_with_stop(drawn, stops) or token in (END, IM_END):
            break
    whole = tokenizer.visible(drawn, stops)
    assert text + stream.rest(whole) == whole
