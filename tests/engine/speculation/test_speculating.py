"""Speculative decoding in a batch beside plain decoding: whatever the drafter says, strict's greedy output is the
target's own, and what a request asks for is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    VOCABULARY,
    Caller,
    alone,
    assert_same_draws,
    local,
    make_cache,
    make_checkpoint,
    make_decoder,
)
from spec_cases import Oracle, chi_square
from torch import Tensor

from shoal.engine.batching import Batcher
from shoal.engine.local import LocalEngine
from shoal.engine.model import Decoder
from shoal.engine.prefix import PrefixStore
from shoal.engine.sequence import Drawn
from shoal.engine.sequence import Sequence as Running
from shoal.engine.shaping import Shaping
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.drafting import Drafting, Fixed, Gammas
from shoal.engine.speculation.drafts import ROOT, Drafts
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import head_config, load_head, new_head, save_head
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.ngram import NgramDrafter
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.speculating import Round, Speculation
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.student import StudentDrafter
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, ModelError
from shoal.planning.speculation import Pacer
from shoal.protocol.sampling import Completion, Grammar, SampleRequest, SamplingParams

PROMPTS = [[int(i) for i in random.Random(n).choices(range(3, VOCABULARY), k=3 + 5 * n)] for n in range(6)]
LENGTHS = [20, 7, 33, 1, 12, 26]
KINDS = ["ngram", "other model", "same model", "eagle", "oracle", "oracle with errors"]


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


@pytest.fixture(scope="module")
def expected(plain: Path) -> list[Completion]:
    return [alone(plain, p, max_tokens=n, temperature=0.0) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def texts(expected: list[Completion]) -> dict[tuple[int, ...], tuple[int, ...]]:
    return {tuple(prompt): done.token_ids for prompt, done in zip(PROMPTS, expected, strict=True)}


def student(directory: Path, width: int = 1, slots: int = 16) -> Drafter:
    decoder = make_decoder(directory)
    return StudentDrafter(decoder, make_cache(decoder, slots), VOCABULARY, width)


def speculation(
    drafter: Drafter, gammas: Gammas, rule: Rule | None = None, width: int = 1, rounds: list[Round] | None = None
) -> Speculation:
    drafting = Drafting(drafter, gammas, tree_width=width, seeded=True)
    return Speculation(drafting, rule or Strict(), on_round=None if rounds is None else rounds.append)


def batcher(
    target: Decoder,
    plain: Path,
    speculates: Speculation | None,
    *,
    slots: int = 4,
    tokens: int = 4096,
    ends: frozenset[int] = frozenset(),
    **more: Any,
) -> Batcher:
    tokenizer = Tokenizer(plain)
    tokenizer.end_ids = ends
    return Batcher(target, tokenizer, make_cache(target, slots, tokens), 256, speculation=speculates, **more)


def ask_all(caller: Caller, **params: Any) -> list[Completion]:
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        caller.ask(prompt, max_tokens=length, **{"temperature": 0.0, **params})
    done = caller.run()
    return [done[number] for number in range(len(PROMPTS))]


def assert_plain(found: list[Completion], expected: list[Completion], model: Any) -> None:
    """The same tokens as plain decoding gave, but for near-ties."""
    for prompt, one, theirs in zip(PROMPTS, found, expected, strict=True):
        assert len(one.token_ids) == len(theirs.token_ids) and one.finish == theirs.finish
        assert_same_draws(model, prompt, one, theirs, uniforms=False)
        if one.token_ids == theirs.token_ids:
            assert one.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert len(one.token_ids) == len(one.logprobs) == len(one.versions)


@pytest.mark.parametrize(("width", "in_flight"), [(1, 1), (3, 1), (1, 3)], ids=["chain", "tree", "ahead"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_the_target_s_own(
    kind: str,
    width: int,
    in_flight: int,
    target: Decoder,
    plain: Path,
    other: Path,
    head_directory: Path,
    expected: list[Completion],
    texts: dict[tuple[int, ...], tuple[int, ...]],
    plain_reference: Any,
) -> None:
    gamma = 4
    drafter: Drafter
    match kind:
        case "ngram":
            drafter = NgramDrafter(3, 1, width)
        case "other model":
            drafter = student(other, width)
        case "same model":
            drafter = student(plain, width)
        case "eagle":
            head = load_head(head_directory, local(plain), torch.float32, target.device)
            drafter = EagleDrafter(head, 4, 4096, width)
        case "oracle":
            drafter = Oracle(texts, 0.0, width)
        case _:
            drafter = Oracle(texts, 0.3, width)
    rounds: list[Round] = []
    speculates = speculation(drafter, Fixed(gamma, in_flight), width=width, rounds=rounds)
    caller = Caller(batcher(target, plain, speculates))
    found = ask_all(caller)
    assert_plain(found, expected, plain_reference)
    assert rounds and caller.batcher.tokens_drawn == sum(LENGTHS)
    accepted = [one for each in rounds for one in each.accepted]
    if kind in ("oracle", "same model"):
        assert max(accepted) == gamma and speculates.accepted / speculates.rounds > 3, "whole drafts are accepted"
    if kind == "oracle with errors":
        assert {0, 1, 2} <= set(accepted), "every accept length occurs"
    if in_flight > 1 and kind != "ngram":
        assert any(each.ahead for each in rounds) == (kind in ("oracle", "same model", "oracle with errors"))
    assert any(len(each.accepted) > 1 for each in rounds)


def test_a_pacer_stops_drafting_what_is_never_right(
    target: Decoder, plain: Path, expected: list[Completion], texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    rounds: list[Round] = []
    speculates = speculation(Oracle(texts, 1.0, 1), Pacer(), rounds=rounds)
    caller = Caller(batcher(target, plain, speculates, slots=1))
    for _ in range(4):
        caller.ask(PROMPTS[2], max_tokens=LENGTHS[2], temperature=0.0)
    done = caller.run()
    assert all(one.token_ids == expected[2].token_ids for one in done.values())
    assert 0 < len(rounds) < 64, "of 128 steps"


@pytest.mark.parametrize(("width", "in_flight"), [(1, 1), (2, 1), (1, 3)])
def test_sampled_rounds_say_the_target_s_probabilities(
    target: Decoder, plain: Path, width: int, in_flight: int
) -> None:
    unsure = make_decoder(plain)
    tensors = local(plain).tensors()
    unsure.load(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 0.6})

    def decoded() -> tuple[list[Completion], list[Round]]:
        rounds: list[Round] = []
        drafter = StudentDrafter(unsure, make_cache(unsure), VOCABULARY, width)
        speculates = speculation(drafter, Fixed(3, in_flight), width=width, rounds=rounds)
        return ask_all(Caller(batcher(target, plain, speculates)), temperature=0.8, seed=5), rounds

    found, rounds = decoded()
    again, _ = decoded()
    assert found == again, "a seed gives the same tokens for the same drafts"
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([[*prompt, *one.token_ids]])
        cache = make_cache(target)
        cache.reserve(1, ids.shape[1], 0)
        hidden = target.forward(ids, torch.zeros(1, dtype=torch.int64), cache)
        logprobs = torch.log_softmax(target.logits(hidden)[0, len(prompt) - 1 : -1] / 0.8, dim=-1)
        own = logprobs.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0].tolist()
        assert one.logprobs == pytest.approx(own, abs=2e-3)
    assert any(one for each in rounds for one in each.accepted)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_sampled_text_has_the_target_s_distribution(target: Decoder, plain: Path, in_flight: int) -> None:
    """Three tokens of many completions, drafted by the same model made less sure."""
    unsure = make_decoder(plain)
    tensors = local(plain).tensors()
    unsure.load(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 0.3})
    drafter = StudentDrafter(unsure, make_cache(unsure, 16), VOCABULARY)
    speculates = speculation(drafter, Fixed(1, in_flight))
    caller = Caller(batcher(target, plain, speculates, slots=16))
    prompt, count = PROMPTS[1], 480
    for seed in range(count):
        caller.ask(prompt, max_tokens=4, top_k=3, seed=seed)
    found = caller.run(10_000)
    assert 0.3 < speculates.accepted / speculates.drafted < 0.95

    def following(prefix: list[int]) -> dict[int, float]:
        cache = make_cache(target)
        cache.reserve(1, 64, 0)
        hidden = target.forward(torch.tensor([[*prompt, *prefix]]), torch.zeros(1, dtype=torch.int64), cache)
        top = target.logits(hidden)[0, -1].topk(3)
        return dict(zip(top.indices.tolist(), torch.softmax(top.values, dim=-1).tolist(), strict=True))

    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        wanted = {(*text, t): p * q for text, p in wanted.items() for t, q in following(list(text)).items()}
    outcomes = [one.token_ids[:3] for one in found.values()]
    assert set(outcomes) <= set(wanted)
    counts = torch.tensor([outcomes.count(text) for text in wanted]).double()
    assert chi_square(counts, torch.tensor(list(wanted.values()))) > 1e-4


def test_what_a_request_asks_for_is_kept(
    target: Decoder, plain: Path, expected: list[Completion], texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    """An end token, a stop string and max_tokens in the middle of accepted drafts; every token is told in order."""
    text = expected[2].token_ids
    tokenizer = Tokenizer(plain)
    drafted: list[Round] = []
    ended = Caller(
        batcher(target, plain, speculation(Oracle(texts, 0.0, 1), Fixed(8), rounds=drafted), ends=frozenset({text[6]}))
    )
    ended.ask(PROMPTS[2], max_tokens=30, temperature=0.0)
    done = ended.run()[0]
    assert done.token_ids == text[: text.index(text[6]) + 1] and done.finish == "stop" and drafted
    stop = next(
        piece for n in range(4, len(text)) if len(piece := tokenizer.visible(list(text[n : n + 2]), ()).strip()) > 1
    )
    stopped = Caller(batcher(target, plain, speculation(Oracle(texts, 0.0, 1), Fixed(8))))
    plainly = Caller(batcher(target, plain, None))
    told: list[Drawn] = []
    for caller in (stopped, plainly):
        caller.ask(PROMPTS[2], max_tokens=30, temperature=0.0, stop=(stop,))
    stopped.running[0].on_token = told.append
    found, wanted = stopped.run()[0], plainly.run()[0]
    assert (found.token_ids, found.finish, found.text) == (wanted.token_ids, "stop", wanted.text)
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert tuple(drawn.token for drawn in told) == found.token_ids


def test_rows_that_no_rule_can_honour_decode_plainly(
    target: Decoder, plain: Path, texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Beside a row that drafts: alternatives, a bias, and a seed, each as it would be alone."""
    shapings = [Shaping(num_top=3), Shaping(bias={17: 5.0}, frequency_penalty=0.5)]

    def run(speculates: Speculation | None) -> tuple[dict[int, Completion], list[Drawn]]:
        caller = Caller(batcher(target, plain, speculates))
        told: list[Drawn] = []
        keep = caller.done.__setitem__
        for number, shaping in enumerate(shapings):
            request = SampleRequest(tuple(PROMPTS[number]), SamplingParams(max_tokens=15, temperature=0.0))
            running = Running(request, lambda done, n=number: keep(-1 - n, done), told.append, shaping.shaper())
            caller.batcher.waiting.append(running)
        caller.ask(PROMPTS[0], max_tokens=20, temperature=0.9, seed=4)
        caller.ask(PROMPTS[2], max_tokens=33, temperature=0.0)
        return caller.run(), told

    rounds: list[Round] = []
    drafting = Drafting(Oracle(texts, 0.2, 1), Fixed(5))
    found, told = run(Speculation(drafting, Strict(), on_round=rounds.append))
    wanted, wanted_told = run(None)
    assert {n: one.token_ids for n, one in found.items()} == {n: one.token_ids for n, one in wanted.items()}
    for number, one in found.items():
        assert one.logprobs == pytest.approx(wanted[number].logprobs, abs=1e-4)
    assert [[t for t, _ in one.top] for one in told] == [[t for t, _ in one.top] for one in wanted_told]
    assert any(sum(map(bool, each.drafted)) == 1 and len(each.drafted) > 1 for each in rounds)
    assert all(sum(map(bool, each.drafted)) <= 1 for each in rounds), "only the last row drafts"


async def test_a_grammar_holds_beside_rows_that_draft(plain: Path) -> None:
    speculates = Speculation(Drafting(NgramDrafter(2, 1), Fixed(4)), Strict())
    async with LocalEngine(
        local(plain), dtype="fp32", device="cpu", max_sequences=8, cache_tokens=2048, context_tokens=200,
        speculation=speculates,
    ) as engine:  # fmt: skip
        engine.tokenizer.end_ids = frozenset()
        params = SamplingParams(max_tokens=40, temperature=1.0)
        grammar = Grammar(kind="regex", text="(in|the){4}")
        asked = [SampleRequest(tuple(PROMPTS[4]), params, grammar=grammar) for _ in range(3)]
        asked += [SampleRequest(tuple(PROMPTS[4]), SamplingParams(max_tokens=60, temperature=0.0)) for _ in range(3)]
        found = await asyncio.gather(*(engine.sample(one) for one in asked))
        assert engine.stats().drafted >= engine.stats().accepted > 0 and engine.stats().rounds > 0
    assert all(len(one.text) in range(8, 13) for one in found[:3])
    assert len({one.token_ids for one in found[3:]}) == 1


def test_cancelled_rows_leave_and_the_others_go_on(
    target: Decoder, plain: Path, expected: list[Completion], texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    for in_flight in (1, 3):
        speculates = speculation(Oracle(texts, 0.1, 1), Fixed(2, in_flight))
        caller = Caller(batcher(target, plain, speculates, slots=6))
        numbers = [caller.ask(PROMPTS[n], max_tokens=LENGTHS[n], temperature=0.0) for n in (5, 2, 0)]
        for _ in range(4):
            caller.batcher.step()
        caller.running[numbers[0]].cancelled = True
        late = caller.ask(PROMPTS[4], max_tokens=LENGTHS[4], temperature=0.0)
        done = caller.run()
        assert done[numbers[0]].finish == "cancelled" and len(done[numbers[0]].token_ids) < LENGTHS[5]
        for number, n in ((numbers[1], 2), (numbers[2], 0), (late, 4)):
            assert done[number].token_ids == expected[n].token_ids
        assert not caller.batcher.live


def test_tokens_carry_the_version_that_judged_them(
    target: Decoder, plain: Path, texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    speculates = speculation(Oracle(texts, 0.0, 1), Fixed(3, 2))
    caller = Caller(batcher(target, plain, speculates))
    number = caller.ask(PROMPTS[2], max_tokens=LENGTHS[2], temperature=0.0)
    for _ in range(4):
        caller.batcher.step()
    before = len(caller.running[number].ids)
    caller.batcher.swapped(7)
    done = caller.run()[number]
    assert before > 4 and done.versions == (0,) * before + (7,) * (LENGTHS[2] - before)
    assert done.token_ids == texts[tuple(PROMPTS[2])], "the same weights under another number"


def test_the_cache_stays_within_its_budget(
    target: Decoder, plain: Path, texts: dict[tuple[int, ...], tuple[int, ...]], expected: list[Completion]
) -> None:
    for width, in_flight in ((1, 1), (3, 1), (1, 4)):
        speculates = speculation(Oracle(texts, 0.1, width), Fixed(8, in_flight), width=width)
        caller = Caller(batcher(target, plain, speculates, slots=3, tokens=3 * 64))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
            caller.ask(prompt, max_tokens=length, temperature=0.0)
        while caller.batcher.step():
            assert caller.batcher.cache.bytes <= caller.batcher.cache.budget_bytes
        assert [caller.done[n].token_ids for n in range(len(PROMPTS))] == [one.token_ids for one in expected]


def test_a_head_reads_prompts_that_were_shared_copied_or_computed_in_pieces(
    target: Decoder, plain: Path, head_directory: Path, expected: list[Completion], plain_reference: Any
) -> None:
    head = load_head(head_directory, local(plain), torch.float32, target.device)
    token_bytes = make_cache(target).token_bytes
    speculates = speculation(EagleDrafter(head, 8, 8192), Fixed(3))
    caller = Caller(
        batcher(target, plain, speculates, slots=8, prefill_tokens=16, prefixes=PrefixStore(2048 * token_bytes))
    )
    prompt = PROMPTS[5]
    first = caller.ask(prompt, max_tokens=LENGTHS[5], temperature=0.0)
    caller.run()
    again = [caller.ask(prompt, max_tokens=LENGTHS[5], temperature=0.0) for _ in range(3)]
    caller.batcher.step()
    again.append(caller.ask(prompt, max_tokens=LENGTHS[5], temperature=0.0))
    longer = caller.ask([*prompt, *expected[5].token_ids[:9]], max_tokens=LENGTHS[5] - 9, temperature=0.0)
    done = caller.run()
    for number in (first, *again):
        assert_same_draws(plain_reference, prompt, done[number], expected[5], uniforms=False)
    assert done[longer].token_ids == expected[5].token_ids[9:]
    assert caller.batcher.reused_tokens > 0 and speculates.rounds > 20


def test_a_head_drafts_the_same_from_a_batch_as_from_the_whole_text(
    target: Decoder, plain: Path, head_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features kept from passes of many kinds are those of one pass over the text."""
    head = load_head(head_directory, local(plain), torch.float32, target.device)

    class Watched(EagleDrafter):
        told: dict[int, tuple[list[int], list[Tensor]]]

        def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
            super().begin(slot, ids, features_TF)
            assert features_TF is not None
            self.told = {**getattr(self, "told", {}), slot: (list(ids), [features_TF])}

        def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
            super().took(slot, tokens, features_KF)
            assert features_KF is not None
            self.told[slot][0].extend(tokens)
            self.told[slot][1].append(features_KF)

    drafter = Watched(head, 4, 4096, 2)
    caller = Caller(batcher(target, plain, speculation(drafter, Fixed(3), width=2), slots=1, prefill_tokens=16))
    prompt = PROMPTS[5]
    caller.ask(prompt, max_tokens=30, temperature=0.0)
    caller.run()
    ids, features = drafter.told[0]
    text = [*prompt, *caller.done[0].token_ids]
    assert ids == text[: len(ids)] and len(ids) > len(prompt) + 20
    seen = {}
    cache = make_cache(target)
    cache.reserve(1, len(ids), 0)
    target.forward(
        torch.tensor([ids]), torch.zeros(1, dtype=torch.int64), cache, observe=lambda n, x: seen.__setitem__(n, x)
    )
    whole = torch.cat([seen[depth] for depth in drafter.depths], dim=-1)[0]
    torch.testing.assert_close(torch.cat(features), whole[: len(ids) - 1], rtol=1e-3, atol=1e-3)


async def test_an_engine_with_a_lossy_rule_takes_no_weights(plain: Path) -> None:
    for rule, refused in ((Margin(0.0, "ratio"), True), (Strict(), False)):
        speculates = Speculation(Drafting(NgramDrafter(), Fixed(2)), rule)
        async with LocalEngine(local(plain), dtype="fp32", device="cpu", speculation=speculates) as engine:
            assert engine.lossy_rule == ("margin" if refused else "")
            with pytest.raises(ModelError, match="rule margin" if refused else "lacks tensor"):
                await engine.load_weights(1, {})


def test_fly_refuses_trees() -> None:
    with pytest.raises(ConfigError, match="chains"):
        Speculation(Drafting(NgramDrafter(width=2), Fixed(2), tree_width=2), Fly())


def test_the_tree_pass_gives_each_branch_its_own_logits(target: Decoder) -> None:
    """Every node of a tree has the logits of the text that leads to it."""
    prompt = PROMPTS[1]
    tree = Drafts.trees([[11, 12, 13, 14, 15]], [[ROOT, ROOT, 0, 1, 2]])
    cache = make_cache(target)
    cache.reserve(1, 64, 0)
    target.forward(torch.tensor([prompt[:-1]]), torch.zeros(1, dtype=torch.int64), cache)
    x = torch.tensor([[prompt[-1], *tree.tokens_BN[0].tolist()]])
    hidden = target.forward(x, torch.tensor([len(prompt) - 1]), cache, tree_BTT=tree.ancestors_BTT())
    logits = target.logits(hidden)[0]
    for node, path in enumerate([[], [11], [12], [11, 13], [12, 14], [11, 13, 15]]):
        alone_cache = make_cache(target)
        alone_cache.reserve(1, 64, 0)
        own = target.forward(torch.tensor([[*prompt, *path]]), torch.zeros(1, dtype=torch.int64), alone_cache)
        torch.testing.assert_close(logits[node], target.logits(own)[0, -1], rtol=1e-4, atol=1e-4)
    cache.settle(0, len(prompt), [1, 3])
    hidden = target.forward(torch.tensor([[20]]), torch.tensor([len(prompt) + 2]), cache)
    alone_cache = make_cache(target)
    alone_cache.reserve(1, 64, 0)
    own = target.forward(torch.tensor([[*prompt, 12, 14, 20]]), torch.zeros(1, dtype=torch.int64), alone_cache)
    torch.testing.assert_close(hidden[0, -1], own[0, -1], rtol=1e-4, atol=1e-4)
