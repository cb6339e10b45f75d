"""Tokens are drawn from the distribution that is reported, and from nothing else."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine import sampling
from shoal.engine.sampling import BLOCK, sample, truncate
from shoal.protocol.sampling import SamplingParams

INFINITY = float("inf")


def draw_many(
    logits: torch.Tensor, params: SamplingParams, number: int, seed: int = 0
) -> tuple[list[int], list[float]]:
    stream = random.Random(seed)
    rows = logits[None].expand(number, -1)
    return sample(rows, [params] * number, [stream.random() for _ in range(number)])


def chi_square(ids: list[int], probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; tokens expected fewer than 10 times count as one."""
    expected = (probabilities.double() * len(ids)).tolist()
    counts = torch.bincount(torch.tensor(ids), minlength=len(expected)).tolist()
    often = [i for i, e in enumerate(expected) if e >= 10]
    rest = [i for i, e in enumerate(expected) if e < 10]
    pairs = [(counts[i], expected[i]) for i in often]
    if (rare := sum(expected[i] for i in rest)) > 1e-9:
        pairs.append((sum(counts[i] for i in rest), rare))
    return sum((c - e) ** 2 / e for c, e in pairs), len(pairs) - 1


def unlikely(statistic: float, freedom: int) -> bool:
    """Whether a chi-square statistic is beyond five standard deviations (Wilson and Hilferty's approximation)."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z > 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("vocabulary", [11, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_draws_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    logits[3] = -INFINITY
    number = 20_000
    ids, logprobs = draw_many(logits, SamplingParams(temperature=temperature), number)
    wanted = torch.log_softmax(logits.double() / temperature, -1)
    assert not unlikely(*chi_square(ids, wanted.exp()))
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted[ids].clamp(max=0), rtol=1e-5, atol=1e-5)


def test_the_statistic_would_notice_a_bias() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ids, _ = draw_many(logits, SamplingParams(), 20_000)
    assert unlikely(*chi_square(ids, torch.softmax(logits * 1.1, -1)))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (0, 0.7), (8, 0.6), (1, 1.0), (0, 1e-9), (0, 1e-261), (500, 0.999)]
)
def test_truncated_draws(top_k: int, top_p: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 2
    number = 5000
    ids, logprobs = draw_many(logits, SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p), number)
    # The reference, by the definitions of top-k and of nucleus sampling (Holtzman et al. 2020).
    probabilities = torch.softmax(logits.double() / 0.8, -1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: top_k or None]
    mass, nucleus = 0.0, []
    for token in kept:
        if mass >= top_p * float(probabilities[kept].sum()):
            break
        nucleus.append(token)
        mass += float(probabilities[token])
    wanted = torch.zeros_like(probabilities)
    wanted[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    assert set(ids) <= set(nucleus)
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted.log()[ids], rtol=1e-4, atol=1e-4)
    assert sum(math.exp(dict(zip(ids, logprobs, strict=True))[t]) for t in set(ids)) <= 1 + 1e-4
    if len(nucleus) > 1:
        assert not unlikely(*chi_square(ids, wanted))


def test_greedy_takes_the_largest_and_reports_the_whole_distribution() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(3))
    ids, logprobs = sample(logits, [SamplingParams(temperature=0.0, top_p=0.5)] * 6, [0.0] * 6)
    assert ids == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(logprobs), torch.log_softmax(logits, -1).amax(-1), rtol=1e-5, atol=1e-5)


def test_rows_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(4)).bfloat16()
    stream = random.Random(0)
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0, 0, 1.0), (1, 0, 1.0), (0.3, 4, 1.0), (2, 0, 0.9), (1, 0, 1.0), (0, 3, 1.0))
    ] + [SamplingParams()] * 3
    uniforms = [stream.random() for _ in params]
    given_logits = logits.clone()
    together = sample(logits, params, uniforms)
    assert torch.equal(logits, given_logits), "the caller's logits were changed"
    alone = [sample(logits[i : i + 1], [params[i]], [uniforms[i]]) for i in range(9)]
    assert together == ([ids[0] for ids, _ in alone], [logprobs[0] for _, logprobs in alone])
    monkeypatch.setattr(sampling, "PIECE_ELEMENTS", 2 * 700)
    assert sample(logits, params, uniforms) == together


rows = st.lists(
    st.one_of(st.floats(-60, 60, width=32), st.just(-INFINITY), st.sampled_from([-3e38, 3e38, 0.0])),
    min_size=1,
    max_size=2 * BLOCK + 5,
).filter(lambda row: max(row) > -INFINITY)
uniforms = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 5e-324, 1 - 2**-53, 1 - 2**-30, 0.5]))
temperatures = st.one_of(st.just(0.0), st.floats(0, 100), st.sampled_from([1e-300, 1e-38, 1e-3, 1.0, 100.0]))


@given(rows, uniforms, temperatures, st.integers(0, 20), st.floats(1e-6, 1.0))
def test_no_impossible_token_is_ever_drawn(
    row: list[float], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([row])
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    (token,), (logprob,) = sample(logits, [params], [uniform])
    assert 0 <= token < len(row)
    assert row[token] > -INFINITY
    assert math.isfinite(logprob) and logprob <= 0
    if temperature == 0:
        assert row[token] == max(row)


@given(rows, st.sampled_from([0.0, 1 - 2**-53]))
def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_possible_token(
    row: list[float], uniform: float
) -> None:
    (token,), _ = sample(torch.tensor([row]), [SamplingParams()], [uniform])
    if uniform == 0.0:
        # A weight below or close to the smallest normal fp32 number may count or may be taken for nothing.
        weights = (torch.tensor(row) - max(row)).double().exp()
        assert token <= int((weights > 2e-38).nonzero()[0, 0])
        assert weights[token] > 1e-46
    else:
        # All that lies behind weighs less than what rounding may lose.
        assert float(torch.softmax(torch.tensor(row).double(), -1)[token + 1 :].sum()) < 1e-6


def test_borders_between_blocks() -> None:
    for first, last in ((300, 310), (BLOCK, BLOCK), (0, BLOCK - 1), (5, 3 * BLOCK), (2 * BLOCK - 1, 2 * BLOCK)):
        logits = torch.full((4 * BLOCK,), -INFINITY)
        logits[[first, last]] = 0.0
        halves = [0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53]
        ids, _ = sample(logits.expand(4, -1), [SamplingParams()] * 4, halves)
        assert ids == [first, first, last, last]


def test_rounding_of_a_blocks_weight_never_leads_outside() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(100, 2 * BLOCK, generator=generator)
    logits[:, BLOCK - 20 :] = -INFINITY
    ids, _ = sample(logits, [SamplingParams()] * 100, [1 - 2**-53] * 100)
    assert ids == [BLOCK - 21] * 100


@given(rows, st.integers(0, 30), st.floats(1e-6, 1.0))
def test_truncation_keeps_the_likeliest(row: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor(row)
    kept = truncate(logits, top_k, top_p)
    assert torch.equal(logits, torch.tensor(row)), "the input was changed"
    inside = kept > -INFINITY
    assert inside.any() and torch.equal(kept[inside], logits[inside])
    outside = ~inside & (logits > -INFINITY)
    if outside.any():
        assert float(logits[inside].min()) >= float(logits[outside].max())


def test_what_is_no_number_is_said() -> None:
    logits = torch.zeros(3, 20)
    logits[0, 4] = float("nan")
    logits[1] = -INFINITY
    ids, logprobs = sample(logits, [SamplingParams()] * 3, [0.3] * 3)
    assert math.isnan(logprobs[0]) and math.isnan(logprobs[1])
    assert logprobs[2] == pytest.approx(-math.log(20))
    assert all(0 <= i < 20 for i in ids)
