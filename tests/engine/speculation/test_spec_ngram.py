"""Prompt look-up: what it finds is what a search through the whole text finds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.speculation.drafts import ROOT
from shoal.engine.speculation.ngram import NgramDrafter, SuffixIndex, merged
from shoal.protocol.sampling import SamplingParams

texts = st.lists(st.integers(0, 2), max_size=40)


@given(texts, st.lists(st.integers(1, 7), max_size=8), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3))
def test_the_index_finds_what_a_search_finds(
    text: list[int], cuts: list[int], longest: int, less: int, width: int
) -> None:
    shortest = max(1, longest - less)
    index = SuffixIndex(longest, shortest, width)
    at = 0
    for cut in cuts:  # however the text comes, in pieces
        index.add(text[at : at + cut])
        at += cut
    index.add(text[at:])
    assert index.ids == text
    ends: list[int] = []
    for length in range(longest, shortest - 1, -1):
        suffix = text[len(text) - length :]
        if length <= len(text):
            ends = [end for end in range(length, len(text)) if text[end - length : end] == suffix]
        if ends:
            break
    found = index.continuations(5)
    assert len(found) == min(width, len(ends))
    for continuation, end in zip(found, reversed(ends), strict=False):
        known = text[end : end + 5]
        assert continuation[: len(known)] == known and len(continuation) == 5
        assert all(a == b for a, b in zip(continuation[len(text) - end :], continuation, strict=False))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.lists(st.integers(0, 2), max_size=4), st.integers(1, 3))
def test_what_lies_beyond_is_looked_up_in_what_is_certain(text: list[int], beyond: list[int], width: int) -> None:
    index = SuffixIndex(3, 1, width)
    index.add(text)
    whole = [*text, *beyond]
    ends: list[int] = []
    for length in (3, 2, 1):
        if length <= len(whole):
            suffix = whole[len(whole) - length :]
            ends = [end for end in range(length, len(text)) if text[end - length : end] == suffix]
        if ends:
            break
    found = index.continuations(4, beyond)
    assert len(found) == min(width, len(ends)) and index.ids == text
    for continuation, end in zip(found, reversed(ends), strict=False):
        known = text[end : end + 4]
        assert continuation[: len(known)] == known and len(continuation) == 4


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=4))
def test_merged_texts_are_the_paths_of_one_tree(several: list[list[int]]) -> None:
    tokens, parents = merged(several)
    paths = set()
    for node, parent in enumerate(parents):
        assert ROOT <= parent < node
        path, above = (tokens[node],), parent
        while above != ROOT:
            path, above = (tokens[above], *path), parents[above]
        assert path not in paths, "common beginnings stand once"
        paths.add(path)
    assert paths == {tuple(text[:n]) for text in several for n in range(1, len(text) + 1)}


def test_each_sequence_has_its_own_text() -> None:
    drafter, greedy = NgramDrafter(3, 2), SamplingParams(temperature=0.0)
    drafter.begin(0, [1, 2, 3, 4, 1, 2], None)
    drafter.begin(1, [5, 6, 7], None)
    drafter.begin(2, [8, 9, 8, 9], None)
    nothing = torch.zeros(3, 4).double()
    drafts = drafter.propose([2, 4, 3], [greedy] * 3, nothing, probs=False)
    assert drafts.sizes == [2, 0, 3] and drafts.tokens_BN[0, :2].tolist() == [3, 4]
    assert drafts.tokens_BN[2].tolist() == [8, 9, 8], "a repetition goes on beyond the end of the text"
    drafter.leave(0, 2)
    drafter.took(1, [5, 6], None)
    drafts = drafter.propose([1, 1], [greedy] * 2, nothing[:2], probs=False)
    assert drafts.tokens_BN.tolist() == [[8], [7]]
