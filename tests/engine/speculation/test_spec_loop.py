"""Speculative decoding beside plain decoding: whatever the drafter says, strict's greedy output is the target's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import VOCABULARY, alone, assert_same_draws, local, make_cache, make_checkpoint, make_decoder
from spec_cases import chi_square
from torch import Tensor

from shoal.engine.model import Decoder
from shoal.engine.speculation.cache import RoundCache
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.drafts import ROOT, Drafts
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import head_config, load_head, new_head, save_head
from shoal.engine.speculation.loop import Fixed, Round, Speculated, Speculator
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.ngram import NgramDrafter
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.student import StudentDrafter
from shoal.errors import CapacityError
from shoal.planning.speculation import Pacer
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

PROMPTS = [[int(i) for i in random.Random(n).choices(range(3, VOCABULARY), k=3 + 5 * n)] for n in range(6)]
LENGTHS = [20, 7, 33, 1, 12, 26]


def round_cache(decoder: Decoder, slots: int = 4, tokens: int = 4096) -> RoundCache:
    arch = decoder.arch
    token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * decoder.dtype.itemsize
    sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, slots, tokens * token_bytes
    return RoundCache(*sizes, decoder.dtype, decoder.device)


@pytest.fixture(scope="module")
def target(plain: Path) -> Decoder:
    return make_decoder(plain)


@pytest.fixture(scope="module")
def head_directory(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head in the public layout."""
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("head")
    config = head_config(local(plain).config(), 64)
    head = new_head(config, config["hidden_size"])
    head.set_vocabulary(torch.randperm(VOCABULARY)[:64].sort().values)
    save_head(head, config, directory, torch.float32)
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the same tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model", seed=7)


def student(directory: Path, width: int) -> Drafter:
    decoder = make_decoder(directory)
    return StudentDrafter(decoder, make_cache(decoder), VOCABULARY, width)


class Oracle:
    """Drafts what plain decoding is known to give, mixed with errors: every accept length occurs, on chains and trees.

    Args:
        texts: by prompt, its completion.
        error: chance that a draft is spoilt.
    """

    depths: tuple[int, ...] = ()

    def __init__(self, texts: dict[tuple[int, ...], tuple[int, ...]], error: float, width: int) -> None:
        self._texts, self._error, self._width = texts, error, width
        self._slots: list[list[int]] = []
        self._known: list[list[int]] = []
        self._random = random.Random(3)

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        prompt = tuple(ids[:-1])
        self._slots.append(list(ids))
        self._known.append([*prompt, *self._texts[prompt]])

    def propose(
        self, gammas: Sequence[int], params: Sequence[SamplingParams], uniforms_BG: Tensor, *, probs: bool
    ) -> Drafts:
        rows, parents = [], []
        for ids, known, gamma in zip(self._slots, self._known, gammas, strict=True):
            tokens: list[int] = []
            above: list[int] = []
            parent = ROOT
            for right in known[len(ids) : len(ids) + gamma]:
                siblings = [(right + n) % VOCABULARY for n in range(self._width)]
                if self._random.random() < self._error:
                    siblings = [(token + 1) % VOCABULARY for token in siblings]
                self._random.shuffle(siblings)
                first = len(tokens)
                tokens += siblings
                above += [parent] * len(siblings)
                parent = first + (siblings.index(right) if right in siblings else 0)
            rows.append(tokens)
            parents.append(above)
        return Drafts.trees(rows, parents)

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        self._slots[slot] += tokens

    def leave(self, slot: int, last: int) -> None:
        for each in (self._slots, self._known):
            each[slot] = each[last]
            del each[last:]


def decode(
    target: Decoder, drafter: Drafter, gammas: Any, rule: Rule | None = None, slots: int = 4, **params: Any
) -> tuple[list[Speculated], list[Round]]:
    rounds: list[Round] = []
    speculator = Speculator(
        target, round_cache(target, slots), drafter, rule or Strict(), gammas, max_nodes=24, on_round=rounds.append
    )
    requests = [
        SampleRequest(tuple(prompt), SamplingParams(max_tokens=length, **{"temperature": 0.0, **params}))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    return speculator.run(requests), rounds


@pytest.fixture(scope="module")
def expected(plain: Path) -> list[Completion]:
    return [alone(plain, p, max_tokens=n, temperature=0.0) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


def assert_plain(found: list[Speculated], expected: list[Completion], model: Any) -> None:
    """The same tokens as plain decoding gave, but for near-ties."""
    for prompt, one, other in zip(PROMPTS, found, expected, strict=True):
        as_completion = Completion(one.token_ids, one.logprobs, (0,) * len(one.token_ids), "length", "")
        assert len(one.token_ids) == len(other.token_ids) and one.finish == "length"
        assert_same_draws(model, prompt, as_completion, other, uniforms=False)
        if one.token_ids == other.token_ids:
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("kind", ["ngram", "other model", "same model", "eagle", "oracle", "oracle with errors"])
def test_greedy_output_is_the_target_s_own(
    kind: str,
    width: int,
    target: Decoder,
    plain: Path,
    other: Path,
    head_directory: Path,
    expected: list[Completion],
    plain_reference: Any,
) -> None:
    texts = {tuple(prompt): done.token_ids for prompt, done in zip(PROMPTS, expected, strict=True)}
    gamma = 5
    drafter: Drafter
    match kind:
        case "ngram":
            drafter = NgramDrafter(3, 1, width)
        case "other model":
            drafter = student(other, width)
        case "same model":
            drafter = student(plain, width)
        case "eagle":
            drafter = EagleDrafter(
                load_head(head_directory, local(plain), torch.float32, target.device), 4, 2048, width
            )
        case "oracle":
            drafter = Oracle(texts, 0.0, width)
        case _:
            drafter = Oracle(texts, 0.3, width)
    found, rounds = decode(target, drafter, Fixed(gamma))
    assert_plain(found, expected, plain_reference)
    assert len(found[3].token_ids) == 1 and found[3].rounds == 0, "one token comes of the prompt's own pass"
    tokens = sum(len(one.token_ids) - 1 for one in found)
    passes = sum(one.rounds for one in found)
    if kind in ("oracle", "same model"):
        assert tokens / passes > 4, "whole drafts are accepted"
        assert max(one for each in rounds for one in each.accepted) == gamma
    if kind == "oracle with errors":
        assert {0, 1, 2} <= {one for each in rounds for one in each.accepted}, "every accept length occurs"
    assert any(each.rows > 1 for each in rounds) and not any(one.lossy for one in found)


def test_pacer_drafts_where_it_pays_and_else_not(
    target: Decoder, plain: Path, expected: list[Completion], plain_reference: Any
) -> None:
    texts = {tuple(prompt): done.token_ids for prompt, done in zip(PROMPTS, expected, strict=True)}

    class Clock:
        """Each reading is a second after the last: a pass costs what a draft costs, however many tokens it has."""

        now = 0.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    for error, pays in ((0.0, True), (1.0, False)):
        rounds: list[Round] = []
        speculator = Speculator(
            target,
            round_cache(target, 1),
            Oracle(texts, error, 1),
            Strict(),
            Pacer(),
            on_round=rounds.append,
            clock=Clock(),
        )
        params = SamplingParams(max_tokens=LENGTHS[2], temperature=0.0)
        found = speculator.run([SampleRequest(tuple(PROMPTS[2]), params)])
        assert found[0].token_ids == expected[2].token_ids
        late = [each.gammas[0] for each in rounds[len(rounds) // 2 :]]
        assert (min(late) > 1) if pays else (max(late) == 0), [each.gammas for each in rounds]


@pytest.mark.parametrize("width", [1, 2])
def test_sampled_rounds_say_the_target_s_probabilities(target: Decoder, other: Path, width: int) -> None:
    found, rounds = decode(target, student(other, width), Fixed(3), temperature=0.8, seed=5)
    again, _ = decode(target, student(other, width), Fixed(3), temperature=0.8, seed=5)
    assert found == again, "a seed gives the same tokens"
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([[*prompt, *one.token_ids]])
        cache = round_cache(target)
        cache.reserve(1, ids.shape[1], 0)
        hidden = target.forward(ids, torch.zeros(1, dtype=torch.int64), cache)
        logprobs = torch.log_softmax(target.logits(hidden)[0, len(prompt) - 1 : -1] / 0.8, dim=-1)
        own = logprobs.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0].tolist()
        assert one.logprobs == pytest.approx(own, abs=2e-3)
    assert any(one for each in rounds for one in each.accepted)


def test_sampled_text_has_the_target_s_distribution(target: Decoder, plain: Path) -> None:
    """Three tokens of many completions, drafted by the same model made less sure."""
    unsure = make_decoder(plain)
    tensors = local(plain).tensors()
    unsure.load(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 0.3})
    drafter = StudentDrafter(unsure, make_cache(unsure, 16), VOCABULARY)
    rounds: list[Round] = []
    speculator = Speculator(target, round_cache(target, 16), drafter, Strict(), Fixed(2), on_round=rounds.append)
    prompt, count = PROMPTS[1], 480
    found = speculator.run(
        [SampleRequest(tuple(prompt), SamplingParams(max_tokens=4, top_k=3, seed=seed)) for seed in range(count)]
    )
    drafts = sum(sum(each.drafted) for each in rounds)
    assert 0.3 < sum(sum(each.accepted) for each in rounds) / drafts < 0.95

    def following(prefix: list[int]) -> dict[int, float]:
        cache = round_cache(target)
        cache.reserve(1, 64, 0)
        hidden = target.forward(torch.tensor([[*prompt, *prefix]]), torch.zeros(1, dtype=torch.int64), cache)
        top = target.logits(hidden)[0, -1].topk(3)
        return dict(zip(top.indices.tolist(), torch.softmax(top.values, dim=-1).tolist(), strict=True))

    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        texts = {(*text, t): p * q for text, p in texts.items() for t, q in following(list(text)).items()}
    outcomes = [one.token_ids[:3] for one in found]
    assert set(outcomes) <= set(texts)
    counts = torch.tensor([outcomes.count(text) for text in texts]).double()
    assert chi_square(counts, torch.tensor(list(texts.values()))) > 1e-4


def test_lossy_rules_say_so(target: Decoder, other: Path) -> None:
    found, _ = decode(target, student(other, 1), Fixed(3), Margin(0.0, "ratio"))
    assert all(one.lossy for one in found)


def test_a_request_that_never_fits_is_refused(target: Decoder) -> None:
    speculator = Speculator(target, round_cache(target, 1, 64), NgramDrafter(), Strict(), Fixed(2))
    with pytest.raises(CapacityError, match="does not fit"):
        speculator.run([SampleRequest(tuple(range(3, 40)), SamplingParams(max_tokens=40))])


def test_an_end_token_ends_a_row_amid_its_drafts(target: Decoder, expected: list[Completion]) -> None:
    text = expected[2].token_ids
    end = text[6]
    texts = {tuple(PROMPTS[2]): text}
    speculator = Speculator(
        target, round_cache(target), Oracle(texts, 0.0, 1), Strict(), Fixed(8), end_ids=frozenset({end})
    )
    request = SampleRequest(tuple(PROMPTS[2]), SamplingParams(max_tokens=30, temperature=0.0))
    done = speculator.run([request])[0]
    assert done.token_ids == text[: text.index(end) + 1] and done.finish == "stop"


def test_the_tree_pass_gives_each_branch_its_own_logits(target: Decoder) -> None:
    """Every node of a tree has the logits of the text that leads to it."""
    prompt = PROMPTS[1]
    tree = Drafts.trees([[11, 12, 13, 14, 15]], [[ROOT, ROOT, 0, 1, 2]])
    cache = round_cache(target)
    cache.reserve(1, 64, 0)
    target.forward(torch.tensor([prompt[:-1]]), torch.zeros(1, dtype=torch.int64), cache)
    x = torch.tensor([[prompt[-1], *tree.tokens_BN[0].tolist()]])
    hidden = target.forward(x, torch.tensor([len(prompt) - 1]), cache, tree_BTT=tree.ancestors_BTT())
    logits = target.logits(hidden)[0]
    for node, path in enumerate([[], [11], [12], [11, 13], [12, 14], [11, 13, 15]]):
        alone_cache = round_cache(target)
        alone_cache.reserve(1, 64, 0)
        own = target.forward(torch.tensor([[*prompt, *path]]), torch.zeros(1, dtype=torch.int64), alone_cache)
        torch.testing.assert_close(logits[node], target.logits(own)[0, -1], rtol=1e-4, atol=1e-4)
    cache.settle(0, len(prompt), [1, 3])
    hidden = target.forward(torch.tensor([[20]]), torch.tensor([len(prompt) + 2]), cache)
    alone_cache = round_cache(target)
    alone_cache.reserve(1, 64, 0)
    own = target.forward(torch.tensor([[*prompt, 12, 14, 20]]), torch.zeros(1, dtype=torch.int64), alone_cache)
    torch.testing.assert_close(hidden[0, -1], own[0, -1], rtol=1e-4, atol=1e-4)
