"""Sampling where a grammar leaves few tokens: the same draw and the same log-probability as over masked logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.sampling import _sample_among, sample
from shoal.protocol.sampling import SamplingParams


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60),
    st.data(),
    st.sampled_from([0.0, 1e-40, 0.5, 1.0, 3.0]),
    st.sampled_from([(0, 1.0), (2, 1.0), (0, 0.7), (3, 0.47)]),
    st.floats(0, 1, exclude_max=True),
)
def test_few_tokens_are_drawn_as_from_masked_logits(
    logits: list[float], data: st.DataObject, temperature: float, truncation: tuple[int, float], uniform: float
) -> None:
    top_k, top_p = truncation
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    allowed = sorted(data.draw(st.sets(st.integers(0, len(logits) - 1), min_size=1)))
    row = torch.tensor(logits)
    masked = torch.full_like(row, float("-inf"))
    masked[allowed] = row[allowed]
    (token,), (logprob,) = sample(masked[None], [params], [uniform])
    found, found_logprob = _sample_among(torch.tensor(allowed), row, params, uniform)
    assert found in allowed
    if found == token:
        assert found_logprob == pytest.approx(logprob, abs=1e-4)
        return
    # fp32 and fp64 part ways only where the number falls between two tokens, or two tokens are as good as each other.
    near = [x / max(temperature, 1e-30) if temperature else x for x in (logits[token], logits[found])]
    if temperature == 0 or not params.is_exact:
        assert near[0] == pytest.approx(near[1], rel=1e-5, abs=1e-5) or _on_an_edge(row, allowed, params, uniform)
    else:
        assert _on_an_edge(row, allowed, params, uniform)


def _on_an_edge(row: torch.Tensor, allowed: list[int], params: SamplingParams, uniform: float) -> bool:
    """Whether a number a trifle smaller or larger draws something else."""
    tokens = torch.tensor(allowed)
    drawn = {_sample_among(tokens, row, params, min(max(uniform + d, 0.0), 1 - 1e-9))[0] for d in (-1e-5, 0.0, 1e-5)}
    return len(drawn) > 1


def test_what_is_forced_is_certain_and_what_is_no_number_is_told() -> None:
    row = torch.tensor([1.0, -3.0, math.nan])
    assert _sample_among(torch.tensor([1]), row, SamplingParams(), 0.9) == (1, 0.0)
    token, logprob = _sample_among(torch.tensor([0, 2]), row, SamplingParams(), 0.5)
    assert token in (0, 2) and math.isnan(logprob)
