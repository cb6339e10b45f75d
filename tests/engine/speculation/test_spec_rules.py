"""Acceptance rules: strict changes nothing, the others change exactly what they say, on trees and chains alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spec_cases import chi_square
from torch import Tensor

from shoal.engine.speculation.drafts import PADDING, ROOT, Drafts
from shoal.engine.speculation.fly import Fly, forgiven
from shoal.engine.speculation.margin import Margin, MarginForm, is_small
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.typical import Typical
from shoal.engine.speculation.verify import Verdict, draw, verify
from shoal.protocol.sampling import SamplingParams

VOCABULARY = 8
TRIALS = 6_000
LOWEST_P = 1e-4

RULES: list[Rule] = [Strict(), Margin(), Margin(0.5, "ratio"), Margin(1.0, "difference"), Semantic(), Typical(), Fly()]

SAMPLED, GREEDY = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)


def tables(seed: int = 0, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """A small first-order language, [V, V] logits: the target's, and a drafter's that is like it."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.5 * sharpness
    # Positive logits, so that the paper's ratio of logits says something.
    target += 4 - target.amin(dim=-1, keepdim=True)
    return target, target + torch.randn(VOCABULARY, VOCABULARY, generator=generator)


def chain_drafts(draft_VV: Tensor, root: int, gamma: int, generator: torch.Generator) -> Drafts:
    """Chains drawn from the drafter's table."""
    last = torch.full((TRIALS,), root)
    tokens, probs = [], []
    for _ in range(gamma):
        q = torch.softmax(draft_VV[last], dim=-1)
        last = torch.tensor(draw(q, torch.rand(TRIALS, dtype=torch.float64, generator=generator)))
        tokens.append(last)
        probs.append(q)
    tokens_BN = torch.stack(tokens, dim=1)
    parents_BN = torch.arange(gamma).repeat(TRIALS, 1) - 1
    return Drafts(tokens_BN, parents_BN, torch.stack(probs, dim=1), drawn=True)


def tree_drafts(draft_VV: Tensor, root: int) -> Drafts:
    """One deterministic tree: the three likeliest tokens, and two behind the first of them."""
    first = draft_VV[root].topk(3).indices.tolist()
    second = draft_VV[first[0]].topk(2).indices.tolist()
    tokens = [*first, *second]
    return Drafts.trees([tokens] * TRIALS, [[ROOT, ROOT, ROOT, 0, 0]] * TRIALS)


def judged(
    rule: Rule, target_VV: Tensor, root: int, drafts: Drafts, params: SamplingParams, seed: int
) -> list[Verdict]:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.full((drafts.tokens_BN.shape[0], 1), root)
    logits_BTV = target_VV[torch.cat((roots, drafts.tokens_BN), dim=1)]
    uniforms = torch.rand(len(roots), drafts.width + 1, dtype=torch.float64, generator=generator)
    return verify(rule, logits_BTV, drafts, [params] * len(roots), uniforms)


def two_tokens(target_VV: Tensor, verdicts: Sequence[Verdict], params: SamplingParams) -> Callable[[Tensor], float]:
    """Chi-square p of the first two tokens against a table of transitions; a second one that the round did not give
    is drawn from the target, as the next round would."""
    generator = torch.Generator().manual_seed(99)
    firsts = torch.tensor([verdict.tokens[0] for verdict in verdicts])
    p_BV = torch.softmax(target_VV[firsts] / params.temperature, dim=-1)
    own = draw(p_BV, torch.rand(len(firsts), dtype=torch.float64, generator=generator))
    seconds = torch.tensor([v.tokens[1] if len(v.tokens) > 1 else t for v, t in zip(verdicts, own, strict=True)])
    counts = torch.bincount(firsts * VOCABULARY + seconds, minlength=VOCABULARY**2).double()

    def against(joint_VV: Tensor) -> float:
        return chi_square(counts, joint_VV.flatten())

    return against


def joint(target_VV: Tensor, root: int, temperature: float) -> Tensor:
    """The target's own distribution of the next two tokens."""
    p_VV = torch.softmax(target_VV / temperature, dim=-1)
    return p_VV[root][:, None] * p_VV


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_strict_samples_from_the_target(shape: str, temperature: float) -> None:
    target, draft = tables()
    generator = torch.Generator().manual_seed(1)
    drafts = chain_drafts(draft, 3, 3, generator) if shape == "chain" else tree_drafts(draft, 3)
    params = SamplingParams(temperature=temperature)
    verdicts = judged(Strict(), target, 3, drafts, params, 2)
    assert 0.3 < sum(bool(v.nodes) for v in verdicts) / TRIALS < 1, "the test needs acceptances and refusals"
    assert two_tokens(target, verdicts, params)(joint(target, 3, temperature)) > LOWEST_P


def test_margin_fails_where_strict_passes() -> None:
    target, draft = tables()
    drafts = chain_drafts(draft, 3, 3, torch.Generator().manual_seed(1))
    verdicts = judged(Margin(0.6), target, 3, drafts, SAMPLED, 2)
    assert two_tokens(target, verdicts, SAMPLED)(joint(target, 3, 1.0)) < LOWEST_P


def test_semantic_samples_from_the_mixture_that_it_says() -> None:
    target, draft = tables()
    rule = Semantic(tau=0.4, entropy_nats=9, top1=1, distance=1)
    drafts = chain_drafts(draft, 3, 1, torch.Generator().manual_seed(1))
    firsts = torch.tensor([v.tokens[0] for v in judged(rule, target, 3, drafts, SAMPLED, 2)])
    counts = torch.bincount(firsts, minlength=VOCABULARY).double()
    p, q = torch.softmax(target[3], dim=-1).double(), torch.softmax(draft[3], dim=-1).double()
    assert chi_square(counts, 0.6 * p + 0.4 * q) > LOWEST_P
    assert chi_square(counts, p) < LOWEST_P
    strict = Semantic(tau=0.4, entropy_nats=0, top1=0, distance=0)
    firsts = torch.tensor([v.tokens[0] for v in judged(strict, target, 3, drafts, SAMPLED, 2)])
    counts = torch.bincount(firsts, minlength=VOCABULARY).double()
    assert chi_square(counts, p) > LOWEST_P, "every token is key: strict"


@pytest.mark.parametrize("rule", [Margin(0.6), Typical()], ids=lambda rule: rule.name)
def test_lossy_rules_have_the_distribution_of_their_formula(rule: Rule) -> None:
    """out = q·a + (1 − Σ q·a)·r, with a and r as each module states them, written here once more by hand."""
    target, draft = tables()
    p_VV, q_VV = torch.softmax(target, -1).double(), torch.softmax(draft, -1).double()
    # Where the draft overrates one of the target's two likeliest tokens most, margin differs most.
    root = int((q_VV - p_VV).gather(1, target.topk(2).indices).amax(dim=-1).argmax())
    z, p, q = target[root].double(), p_VV[root], q_VV[root]
    a, r = (p / q).clamp(max=1), (p - q).clamp(min=0)
    if isinstance(rule, Margin):
        first, second = z.topk(2).indices
        if z[second] > rule.theta * z[first]:
            a[first] = a[second] = 1.0
    else:
        assert isinstance(rule, Typical)
        threshold = min(rule.epsilon, rule.delta * math.exp(float((p * p.log()).sum())))
        a, r = (p > threshold).double(), p
        a[p.argmax()] = 1.0
    expected = q * a + (1 - (q * a).sum()) * r / r.sum()
    drafts = chain_drafts(draft, root, 1, torch.Generator().manual_seed(1))
    firsts = torch.tensor([v.tokens[0] for v in judged(rule, target, root, drafts, SAMPLED, 2)])
    counts = torch.bincount(firsts, minlength=VOCABULARY).double()
    assert chi_square(counts, expected) > LOWEST_P
    assert chi_square(counts, p) < LOWEST_P


def test_forms_of_the_margin_that_do_not_move_with_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    top = (torch.randn(500, 2, generator=generator) * 3 + 8).sort(dim=-1, descending=True).values
    for form, theta in (("ratio", 0.5), ("difference", 0.7)):
        assert torch.equal(is_small(top, theta, form), is_small(top + 32, theta, form))  # type: ignore[arg-type]
    assert not torch.equal(is_small(top, 0.9, "logits"), is_small(top + 32, 0.9, "logits"))
    # What FACTS of this form says: at θ = 0.9 it admits p2/p1 of 0.61 for z1 = 5, and of 0.018 for z1 = 40.
    for z1, ratio in ((5.0, 0.61), (40.0, 0.0185)):
        just, short = z1 + math.log(ratio * 1.02), z1 + math.log(ratio * 0.97)
        assert is_small(torch.tensor([[z1, just], [z1, short]]), 0.9, "logits").tolist() == [True, False]


@pytest.mark.parametrize("form", ["logits", "ratio", "difference"])
def test_margin_is_strict_without_a_margin_or_below_zero(form: MarginForm) -> None:
    theta = {"logits": 0.9, "ratio": 0.5, "difference": 0.5}[form]
    logits = torch.tensor([[[3.0, 2.9, 0.1], [0, 0, 0]], [[3.0, 1.0, 0.1], [0, 0, 0]], [[-1.0, -1.05, -9], [0, 0, 0]]])
    verdicts = verify(Margin(theta, form), logits, Drafts.chains([[1]] * 3), [GREEDY] * 3, torch.zeros(3, 2).double())
    below_zero = form != "logits"  # there the paper's ratio says nothing
    assert [bool(v.nodes) for v in verdicts] == [True, False, below_zero]
    assert verdicts[1].tokens == (0,)


def test_semantic_greedy_takes_the_mixture_s_likeliest() -> None:
    p, q = torch.tensor([0.40, 0.36, 0.24]), torch.tensor([0.30, 0.45, 0.25])
    drafts = Drafts.chains([[1]], q.view(1, 1, 3), drawn=True)
    logits = torch.stack((p.log(), p.log()))[None]
    zero = torch.zeros(1, 2).double()
    assert verify(Semantic(tau=0.5), logits, drafts, [GREEDY], zero)[0].nodes == (0,)
    assert verify(Semantic(tau=0.05), logits, drafts, [GREEDY], zero)[0].tokens == (0,)
    assert verify(Semantic(tau=0.5, distance=0.05), logits, drafts, [GREEDY], zero)[0].tokens == (0,), "key"


def test_fly_forgives_a_lone_mismatch_in_doubt() -> None:
    doubt, sure, fits = [2.0, 1.9, 1.8], [9.0, 0.0, 0.0], [5.0, 0.0, 0.0]
    zero = torch.zeros(1, 6).double()

    def nodes(first: list[float], *after: list[float]) -> int:
        rows = torch.tensor([[first, *after, fits]])
        drafts = Drafts.chains([[1] + [0] * len(after)])
        return len(verify(Fly(window=2), rows, drafts, [GREEDY], zero[:, : rows.shape[1]])[0].nodes)

    assert nodes(doubt, fits, fits) == 3
    assert nodes(sure, fits, fits) == 0, "the target is sure"
    assert nodes(doubt, fits) == 0, "too few tokens after it"
    assert nodes(doubt, fits, [0.0, 5.0, 0.0]) == 0, "another mismatch in its window"
    assert nodes(doubt, fits, fits, [0.0, 5.0, 0.0]) == 3, "a mismatch behind its window"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.integers(1, 4))
def test_what_fly_forgives(chain: list[tuple[bool, bool]], window: int) -> None:
    refused, wait = [r for r, _ in chain], [w for _, w in chain]
    kept = forgiven(refused, wait, window)
    for i, yes in enumerate(kept):
        following = refused[i + 1 : i + 1 + window]
        assert yes == (refused[i] and wait[i] and len(following) == window and not any(following))


@st.composite
def ragged(draw_: st.DrawFn) -> tuple[Drafts, int]:
    """Drafts of rows with trees of different sizes, with or without distributions."""
    batch = draw_(st.integers(1, 4))
    rows, parents = [], []
    for _ in range(batch):
        size = draw_(st.integers(0, 5))
        above = [draw_(st.integers(ROOT, node - 1)) for node in range(size)]
        siblings: dict[int, set[int]] = {}
        tokens = []
        for parent in above:
            free = sorted(set(range(VOCABULARY)) - siblings.setdefault(parent, set()))
            tokens.append(draw_(st.sampled_from(free)))
            siblings[parent].add(tokens[-1])
        rows.append(tokens)
        parents.append(above)
    probs = None
    if draw_(st.booleans()):
        generator = torch.Generator().manual_seed(batch)
        width = max(map(len, rows))
        probs = torch.softmax(torch.randn(batch, width, VOCABULARY, generator=generator), dim=-1)
    return Drafts.trees(rows, parents, probs), batch


@given(
    ragged(),
    st.sampled_from(RULES),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_every_rule_gives_a_path_and_one_token_more(
    made: tuple[Drafts, int], rule: Rule, temperatures: list[float], seed: int
) -> None:
    drafts, batch = made
    if isinstance(rule, Fly) and not drafts.are_chains:
        return
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, drafts.width + 1, VOCABULARY, generator=generator) * 2 + 3
    uniforms = torch.rand(batch, drafts.width + 1, dtype=torch.float64, generator=generator)
    params = [SamplingParams(temperature=t, top_k=4) for t in temperatures[:batch]]
    verdicts = verify(rule, logits, drafts, params, uniforms)
    assert len(verdicts) == batch
    for row, verdict in enumerate(verdicts):
        parents = drafts.parents_BN[row].tolist()
        assert [parents[node] for node in verdict.nodes] == [ROOT, *verdict.nodes][: len(verdict.nodes)]
        assert len(verdict.tokens) == len(verdict.logprobs) == len(verdict.nodes) + 1
        assert verdict.tokens[:-1] == tuple(drafts.tokens_BN[row, list(verdict.nodes)].tolist())
        assert all(math.isfinite(x) and x <= 0 for x in verdict.logprobs)
        if rule.name == "strict":
            _assert_strict(logits[row], verdict, params[row])
    # A row alone has the same outcome.
    row = seed % batch
    one = Drafts(
        drafts.tokens_BN[row : row + 1],
        drafts.parents_BN[row : row + 1],
        None if drafts.probs_BNV is None else drafts.probs_BNV[row : row + 1],
    )
    assert verify(rule, logits[row : row + 1], one, [params[row]], uniforms[row : row + 1]) == [verdicts[row]]


def _assert_strict(logits_TV: Tensor, verdict: Verdict, params: SamplingParams) -> None:
    for token, logprob, above in zip(verdict.tokens, verdict.logprobs, [ROOT, *verdict.nodes], strict=True):
        z = logits_TV[above + 1] / (params.temperature or 1.0)
        if params.temperature == 0:
            assert token == int(z.argmax())
        else:
            allowed = z.topk(params.top_k).indices
            assert token in allowed.tolist(), "truncation holds for accepted and drawn tokens"
            z = torch.full_like(z, -math.inf).index_copy(0, allowed, z[allowed])
        assert logprob == pytest.approx(float(torch.log_softmax(z, -1)[token]), abs=1e-4)


@given(ragged())
def test_each_node_sees_its_ancestors(made: tuple[Drafts, int]) -> None:
    drafts, batch = made
    seen = drafts.ancestors_BTT()
    for row in range(batch):
        parents = drafts.parents_BN[row].tolist()
        for node, parent in enumerate(parents):
            expected = {node + 1}
            if parent != PADDING:
                above = node
                while above != ROOT:
                    above = parents[above]
                    expected.add(above + 1)
            assert set(seen[row, node + 1].nonzero()[:, 0].tolist()) == expected
    assert drafts.sizes == [int((drafts.parents_BN[row] != PADDING).sum()) for row in range(batch)]
