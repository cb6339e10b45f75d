"""Speculation over stages: greedy output is the local engine's, for every drafter, also when frames fly ahead, when
guesses fail and when a stage dies amid them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    PLAIN,
    VOCABULARY,
    assert_same_draws,
    local,
    make_cache,
    make_checkpoint,
    make_decoder,
    reference,
)
from ring_cases import RingOfStages, assert_greedy_under_its_version, ring_of
from spec_cases import Oracle

from shoal.engine.local import LocalEngine
from shoal.engine.sequence import Drawn
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.drafting import Drafting, Fixed, Gammas
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import head_config, load_head, new_head, save_head
from shoal.engine.speculation.ngram import NgramDrafter
from shoal.engine.speculation.speculating import Round, Speculation
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.student import StudentDrafter
from shoal.planning.speculation import Pacer
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

LENGTHS = (3, 9, 30, 70, 9, 5)
PROMPTS = [tuple(range(20, 20 + length)) for length in LENGTHS]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, so that there is something to share out."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "model", PLAIN, num_hidden_layers=5)


@pytest.fixture(scope="module")
def deep_reference(deep: Path) -> Any:
    return reference(deep)


@pytest.fixture(scope="module")
def head_directory(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("head")
    config = head_config(local(deep).config(), 64)
    head = new_head(config, config["hidden_size"])
    head.set_vocabulary(torch.randperm(VOCABULARY)[:64].sort().values)
    save_head(head, config, directory, torch.float32)
    return directory


def requests(max_tokens: int = 30) -> list[SampleRequest]:
    return [SampleRequest(p, SamplingParams(max_tokens=max_tokens, temperature=0.0)) for p in PROMPTS]


@pytest.fixture(scope="module")
def expected(deep: Path) -> list[Completion]:
    async def draw() -> list[Completion]:
        async with LocalEngine(
            local(deep), dtype="fp32", device="cpu", max_sequences=16, cache_tokens=4096, context_tokens=256,
            prefill_tokens=64,
        ) as engine:  # fmt: skip
            engine.tokenizer.end_ids = frozenset()
            return list(await asyncio.gather(*(engine.sample(one) for one in requests())))

    return asyncio.run(draw())


@pytest.fixture(scope="module")
def texts(expected: list[Completion]) -> dict[tuple[int, ...], tuple[int, ...]]:
    return {prompt: done.token_ids for prompt, done in zip(PROMPTS, expected, strict=True)}


def speculating(
    make: Callable[[], Drafter], gammas: Callable[[], Gammas], rounds: list[Round], width: int = 1
) -> Callable[[int, int], Speculation]:
    return lambda slots, tokens: Speculation(
        Drafting(make(), gammas(), tree_width=width), Strict(), on_round=rounds.append
    )


async def draw_all(ring: RingOfStages, asked: list[SampleRequest]) -> list[Completion]:
    ring.engine.tokenizer.end_ids = frozenset()
    return list(await asyncio.gather(*(ring.engine.sample(one) for one in asked)))


def assert_all_same(model: Any, one: list[Completion], other: list[Completion]) -> None:
    assert len(one) == len(other) == len(PROMPTS)
    for prompt, mine, theirs in zip(PROMPTS, one, other, strict=True):
        assert len(mine.token_ids) == len(theirs.token_ids) and mine.finish == theirs.finish
        assert_same_draws(model, prompt, mine, theirs, uniforms=False)


@pytest.mark.parametrize(
    ("cuts", "width"),
    [
        pytest.param([2], 1, id="2 stages, chain"),
        pytest.param([1, 3], 3, id="3 stages, tree"),
        pytest.param([2], 3, id="2 stages, tree", marks=pytest.mark.slow),
        pytest.param([1, 3], 1, id="3 stages, chain", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["ngram", "student", "eagle", "oracle with errors"])
async def test_a_ring_that_drafts_draws_what_the_local_engine_draws(
    kind: str,
    width: int,
    cuts: list[int],
    deep: Path,
    deep_reference: Any,
    head_directory: Path,
    expected: list[Completion],
    texts: dict[tuple[int, ...], tuple[int, ...]],
) -> None:
    def make() -> Drafter:
        if kind == "ngram":
            return NgramDrafter(3, 1, width)
        if kind == "student":
            decoder = make_decoder(deep)
            return StudentDrafter(decoder, make_cache(decoder), VOCABULARY, width)
        if kind == "eagle":
            return EagleDrafter(load_head(head_directory, local(deep), torch.float32, CPU), 16, 8192, width)
        return Oracle(texts, 0.3, width)

    rounds: list[Round] = []
    async with ring_of(deep, cuts, speculate=speculating(make, lambda: Fixed(3), rounds, width)) as ring:
        assert_all_same(deep_reference, await draw_all(ring, requests()), expected)
        assert ring.engine.stats().drafted > 0
    assert len(rounds) > 3 and all(each.delay_s >= 0 for each in rounds)
    if kind != "eagle":
        assert any(one for each in rounds for one in each.accepted)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ngram", marks=pytest.mark.slow),
        pytest.param("student", marks=pytest.mark.slow),
        "oracle with errors",
    ],
)
async def test_frames_fly_ahead_and_are_reconciled(
    kind: str,
    deep: Path,
    deep_reference: Any,
    expected: list[Completion],
    texts: dict[tuple[int, ...], tuple[int, ...]],
) -> None:
    def make() -> Drafter:
        if kind == "ngram":
            return NgramDrafter(3, 1)
        if kind == "student":
            decoder = make_decoder(deep)
            return StudentDrafter(decoder, make_cache(decoder), VOCABULARY)
        return Oracle(texts, 0.15, 1)

    rounds: list[Round] = []
    speculate = speculating(make, lambda: Fixed(2, 4), rounds)
    async with ring_of(deep, [1, 3], speculate=speculate, link_s=0.002) as ring:
        one_by_one = []
        for asked in requests():
            one_by_one += await draw_all(ring, [asked])
        assert_all_same(deep_reference, one_by_one, expected)
        alone_ahead = sum(each.ahead for each in rounds)
        assert_all_same(deep_reference, await draw_all(ring, requests()), expected)
        dropped = sum(node.num_dropped for node in ring.nodes.values())
        steps = sum(node.num_steps for node in ring.nodes.values())
    assert alone_ahead > 3
    if kind == "oracle with errors":
        flown = [each for each in rounds if each.ahead]
        assert any(max(each.accepted) == 2 for each in flown) and any(min(each.accepted) < 2 for each in rounds)
        assert dropped + steps > 3 * len(rounds), "frames that were refuted had been sent"


@pytest.mark.parametrize("in_flight", [1, 3])
async def test_a_stage_that_dies_amid_drafts_costs_a_pause(
    in_flight: int,
    deep: Path,
    deep_reference: Any,
    expected: list[Completion],
    texts: dict[tuple[int, ...], tuple[int, ...]],
) -> None:
    rounds: list[Round] = []
    speculate = speculating(lambda: Oracle(texts, 0.1, 1), lambda: Fixed(2, in_flight), rounds)
    async with ring_of(deep, [1, 3], speculate=speculate) as ring:
        ring.engine.tokenizer.end_ids = frozenset()
        spare = await ring.add()

        async def one(request: SampleRequest) -> Completion:
            drawn = [each async for each in ring.engine.draws(request)]
            assert isinstance(drawn[-1], Completion)
            assert [each.token for each in drawn if isinstance(each, Drawn)] == list(drawn[-1].token_ids)
            return drawn[-1]

        asked = asyncio.gather(*(one(request) for request in requests()))
        for nth in range(3):
            before = len(rounds)
            async with asyncio.timeout(60):
                while len(rounds) < before + 2 and not asked.done():  # noqa: ASYNC110 - another thread counts
                    await asyncio.sleep(0.001)
            await ring.kill(list(ring.nodes)[nth % 2])
            if nth == 2:
                spare = await ring.add()
            keys = list(ring.nodes)
            await ring.assign(keys, [2] if len(keys) == 2 else [1, 4])
        assert spare in ring.nodes
        found = list(await asked)
        assert ring.engine.stats().rebuilt_tokens > 0
    assert_all_same(deep_reference, found, expected)


async def test_weights_change_amid_drafts(
    deep: Path, deep_reference: Any, texts: dict[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", PLAIN, seed=9, num_hidden_layers=5)
    rounds: list[Round] = []
    speculate = speculating(lambda: Oracle(texts, 0.1, 1), lambda: Fixed(2, 3), rounds)
    async with ring_of(deep, [2], speculate=speculate) as ring:
        ring.engine.tokenizer.end_ids = frozenset()
        asked = asyncio.gather(*(ring.engine.sample(request) for request in requests()))
        for model in (other, deep):
            before = len(rounds)
            async with asyncio.timeout(60):
                while len(rounds) < before + 2 and not asked.done():  # noqa: ASYNC110 - another thread counts
                    await asyncio.sleep(0.001)
            await ring.change(local(model), [2])
        found = list(await asked)
    references = {0: deep_reference, 1: reference(other), 2: deep_reference}
    assert {version for each in found for version in each.versions} >= {0, 2}
    for request, completion in zip(requests(), found, strict=True):
        assert_greedy_under_its_version(references, request.prompt_ids, completion)


@pytest.mark.slow
async def test_speculation_is_faster_than_plain_over_long_links(
    deep: Path, expected: list[Completion], texts: dict[tuple[int, ...], tuple[int, ...]]
) -> None:
    """30 ms on each of three links: a round of drafts takes about as long as a plain step."""
    seconds: dict[str, float] = {}
    for name, gammas in (("plain", lambda: Fixed(0)), ("drafts", lambda: Fixed(4)), ("adaptive", Pacer)):
        speculate = speculating(lambda: Oracle(texts, 0.1, 1), gammas, [])
        async with ring_of(deep, [1, 3], speculate=speculate, link_s=0.03) as ring:
            await draw_all(ring, requests(2)[2:3])
            started = time.perf_counter()
            found = [(await draw_all(ring, [asked]))[0] for asked in requests()[2:5]]
            seconds[name] = time.perf_counter() - started
        assert [one.token_ids for one in found] == [one.token_ids for one in expected[2:5]]
    assert seconds["drafts"] < seconds["plain"] and seconds["adaptive"] < seconds["plain"], seconds
