"""A ring of stages draws what the local engine draws, also when stages go and come in the middle."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PLAIN, assert_same_draws, local, make_checkpoint, reference
from ring_cases import RingOfStages, assert_greedy_under_its_version, ring_of

from shoal.broadcast.link import Address, dial
from shoal.engine.local import LocalEngine
from shoal.engine.pipeline.links import StepLink
from shoal.engine.pipeline.remote import RemoteCache, RemoteDecoder
from shoal.engine.sequence import Drawn
from shoal.engine.shaping import Shaping
from shoal.errors import ModelError, NetworkError
from shoal.fabric.identity import Identity
from shoal.protocol.codec import encode
from shoal.protocol.sampling import Completion, Grammar, SampleRequest, SamplingParams
from shoal.protocol.stage import Step

LENGTHS = (3, 9, 30, 70, 9, 5)
PROMPTS = [tuple(range(20, 20 + length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, so that there is something to share out."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "model", PLAIN, num_hidden_layers=5)


@pytest.fixture(scope="module")
def deep_reference(deep: Path) -> Any:
    return reference(deep)


def requests(max_tokens: int = 24, **params: Any) -> list[SampleRequest]:
    return [SampleRequest(p, SamplingParams(max_tokens=max_tokens, seed=n, **params)) for n, p in enumerate(PROMPTS)]


async def local_draws(directory: Path, asked: list[SampleRequest]) -> list[Completion]:
    async with LocalEngine(
        local(directory), dtype="fp32", device="cpu", max_sequences=16, cache_tokens=4096, context_tokens=256,
        prefill_tokens=64,
    ) as engine:  # fmt: skip
        return list(await asyncio.gather(*(engine.sample(one) for one in asked)))


def assert_all_same(
    model: Any, asked: list[SampleRequest], one: list[Completion], other: list[Completion], *, uniforms: bool = True
) -> None:
    assert len(asked) == len(one) == len(other)
    for request, mine, theirs in zip(asked, one, other, strict=True):
        assert len(mine.token_ids) == len(theirs.token_ids) and mine.finish == theirs.finish
        assert_same_draws(model, request.prompt_ids, mine, theirs, uniforms=uniforms)


async def draw_all(ring: RingOfStages, asked: list[SampleRequest]) -> list[Completion]:
    return list(await asyncio.gather(*(ring.engine.sample(one) for one in asked)))


@pytest.mark.parametrize("cuts", [[], [2], [1, 3], [1, 2, 3, 4]], ids=["1", "2", "3", "5"])
async def test_a_ring_draws_what_the_local_engine_draws(deep: Path, deep_reference: Any, cuts: list[int]) -> None:
    asked = requests(temperature=1.0, top_p=0.95)
    expected = await local_draws(deep, asked)
    async with ring_of(deep, cuts) as ring:
        assert_all_same(deep_reference, asked, expected, await draw_all(ring, asked))


async def test_a_result_of_a_ring_that_was_replaced_meanwhile_does_not_count(deep: Path) -> None:
    """Later steps went to stages that have never computed what it says."""
    async with ring_of(deep, [2]) as ring:
        decoder = RemoteDecoder(ring.model.config(), torch.float32, torch.device("cpu"), ring.rings, 0)
        cache = RemoteCache(decoder, ring.engine.lane_slots, ring.engine.lane_tokens)
        cache.reserve(1, 32, 0)
        first, _ = decoder.launch(torch.tensor([[5, 6, 7]]), torch.tensor([0]), cache)
        second, _ = decoder.launch(torch.tensor([[8, 9]]), torch.tensor([3]), cache)
        assert await asyncio.to_thread(first) is not None
        cache.holds(0, [5, 6, 7])
        async with asyncio.timeout(60):
            while sum(node.num_steps for node in ring.nodes.values()) < 4:  # noqa: ASYNC110 - a thread counts
                await asyncio.sleep(0.01)
        await ring.assign(list(ring.nodes), [3])
        third, _ = await asyncio.to_thread(decoder.launch, torch.tensor([[10]]), torch.tensor([5]), cache)
        assert await asyncio.to_thread(second) is None
        assert await asyncio.to_thread(third) is not None


@pytest.mark.parametrize("prefix_tokens", [0, 512])
async def test_weights_change_under_what_is_alive(
    deep: Path, deep_reference: Any, tmp_path: Path, prefix_tokens: int
) -> None:
    other = make_checkpoint(tmp_path / "other", PLAIN, seed=9, num_hidden_layers=5)
    references = {0: deep_reference, 1: reference(other), 2: deep_reference}
    asked = [SampleRequest(p, SamplingParams(max_tokens=80, temperature=0)) for p in PROMPTS]
    async with ring_of(deep, [2], prefix_tokens=prefix_tokens) as ring:
        ring.engine.tokenizer.end_ids = frozenset()

        async def one(request: SampleRequest, after: int) -> Completion:
            async with asyncio.timeout(60):
                while len(told) < after:  # noqa: ASYNC110 - any request's tokens count
                    await asyncio.sleep(0.001)
            drawn = [each async for each in ring.engine.draws(request) if told.append(each) is None]
            assert isinstance(drawn[-1], Completion)
            return drawn[-1]

        told: list[object] = []
        tasks = [asyncio.create_task(one(request, 12 * place)) for place, request in enumerate(asked)]
        for model, after in ((other, 20), (deep, 70)):
            async with asyncio.timeout(60):
                while len(told) < after:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            await ring.change(local(model), [2])
        found = list(await asyncio.gather(*tasks))
        assert ring.engine.version == 2
        again = await ring.engine.sample(asked[0])
    assert {version for each in found for version in each.versions} == {0, 1, 2}
    assert any(len(set(each.versions)) > 1 for each in found), "nobody was alive when weights changed"
    for request, completion in zip([*asked, asked[0]], [*found, again], strict=True):
        assert_greedy_under_its_version(references, request.prompt_ids, completion)
    assert set(again.versions) == {2}


async def test_weights_of_another_model_are_refused(deep: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", PLAIN, num_hidden_layers=5, vocab_size=300)
    async with ring_of(deep, [2]) as ring:
        with pytest.raises(ModelError, match="shape"):
            ring.engine.make_weights(1, local(other).tensors())
        with pytest.raises(ModelError, match="cannot be changed"):
            await ring.engine.load_weights(1, {})


async def test_a_qwen3_ring_with_an_untied_head(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "qwen", "qwen3-untied-one-key-head", num_hidden_layers=3)
    asked = requests(temperature=0.0)
    expected = await local_draws(directory, asked)
    async with ring_of(directory, [1, 2]) as ring:
        assert_all_same(reference(directory), asked, expected, await draw_all(ring, asked), uniforms=False)


async def test_a_single_sequence_is_the_same_to_the_last_bit(deep: Path) -> None:
    """What travels loses nothing, and each stage's cache has the shape that the local one has."""
    asked = [requests(temperature=0.7)[3]]
    expected = await local_draws(deep, asked)
    async with ring_of(deep, [1, 3]) as ring:
        found = await draw_all(ring, asked)
    assert found[0].token_ids == expected[0].token_ids
    assert found[0].logprobs == expected[0].logprobs


async def test_several_batches_are_under_way(deep: Path, deep_reference: Any) -> None:
    asked = requests(temperature=0.0)
    expected = await local_draws(deep, asked)
    async with ring_of(deep, [2], lanes=3) as ring:
        assert_all_same(deep_reference, asked, expected, await draw_all(ring, asked), uniforms=False)
        assert all(lane.stats().tokens_drawn > 0 for lane in ring.engine.lanes)
        assert ring.engine.stats().live == 0


async def test_each_stage_has_its_own_tensors_and_no_others(deep: Path) -> None:
    names = set(local(deep).tensors())
    async with ring_of(deep, [2, 4]) as ring:
        loaded = ring.loaded
    assert set().union(*loaded) == names and sum(map(len, loaded)) == len(names)
    assert "model.embed_tokens.weight" in loaded[0] and "model.norm.weight" in loaded[2]
    assert any("layers.3." in name for name in loaded[1]) and not any("layers.1." in name for name in loaded[1])


async def test_shaping_is_the_local_engines(deep: Path) -> None:
    request = SampleRequest(PROMPTS[1], SamplingParams(max_tokens=12, temperature=0.0))
    shaping = Shaping(bias={77: 100.0}, presence_penalty=2.0, num_top=3)
    async with ring_of(deep, [3]) as ring:
        drawn = [one async for one in ring.engine.draws(request, shaping)]
    tokens = [one for one in drawn if isinstance(one, Drawn)]
    assert [one.token for one in tokens] == [77] * 12
    assert all(len(one.top) == 3 for one in tokens)


async def test_a_constrained_completion_matches(deep: Path) -> None:
    asked = [
        SampleRequest(prompt, SamplingParams(max_tokens=20, seed=n), grammar=Grammar(kind="regex", text="[ab]{3,5}"))
        for n, prompt in enumerate(PROMPTS)
    ]
    async with ring_of(deep, [2], lanes=2) as ring:
        found = await draw_all(ring, asked)
    assert all(re.fullmatch("[ab]{3,5}", one.text) for one in found), [one.text for one in found]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.001)


async def after(ring: RingOfStages, tokens: int) -> None:
    """Wait until so many tokens were drawn."""
    await until(lambda: ring.engine.stats().tokens_drawn >= tokens)


@pytest.mark.parametrize("lanes", [1, 3])
async def test_a_lost_stages_layers_move_and_everything_goes_on(deep: Path, deep_reference: Any, lanes: int) -> None:
    asked = requests(max_tokens=60, temperature=1.0)
    expected = await local_draws(deep, asked)
    async with ring_of(deep, [2, 4], lanes=lanes) as ring:
        first, second, third = ring.nodes
        drawing = asyncio.create_task(draw_all(ring, asked))
        await after(ring, 50)
        await ring.kill(second)
        await until(lambda: second in ring.lost)
        await ring.assign([third, first], [3])
        await after(ring, 200)
        spare = await ring.add()
        await ring.assign([first, spare, third], [1, 4])
        found = await drawing
        assert ring.engine.stats().rebuilt_tokens > 0
    assert_all_same(deep_reference, asked, expected, found)


async def test_what_cannot_go_directly_goes_by_the_requester(deep: Path, deep_reference: Any) -> None:
    asked = requests(temperature=0.0)
    expected = await local_draws(deep, asked)
    async with ring_of(deep, [2]) as ring:
        first, second = ring.nodes
        nowhere = ring.addresses[second]
        ring.addresses[second] = type(nowhere)(host=nowhere.host, port=1, public_key=nowhere.public_key)
        await ring.assign([first, second], [2])
        assert_all_same(deep_reference, asked, expected, await draw_all(ring, asked), uniforms=False)


async def test_all_stages_lost_ends_what_is_alive_and_the_engine_recovers(deep: Path) -> None:
    asked = requests(max_tokens=180, temperature=0.0)
    async with ring_of(deep, [2], patience_s=0.3) as ring:
        drawing = asyncio.create_task(draw_all(ring, asked))
        await after(ring, 20)
        for key in list(ring.nodes):
            await ring.kill(key)
        lost = await drawing
        assert {one.finish for one in lost} == {"cancelled"}
        assert ring.engine.trouble and ring.engine.is_alive
        with pytest.raises(ModelError, match="Try again"):
            await ring.engine.sample(asked[0])
        await ring.assign([await ring.add()], [])
        again = requests(max_tokens=8, temperature=0.0)
        assert [one.finish for one in await draw_all(ring, again)] == ["length"] * len(again)
        assert not ring.engine.trouble


async def test_steps_of_a_node_that_is_not_before_this_one_are_not_taken(deep: Path) -> None:
    """It may link, being granted; its link ends with its first step, and the ring goes on."""
    async with ring_of(deep, [2]) as ring:
        drawing = asyncio.create_task(draw_all(ring, requests(max_tokens=40, temperature=0.0)))
        await after(ring, 10)
        stranger = Identity.generate()
        first, second = list(ring.nodes)
        ring.nodes[stranger.public_key] = ring.nodes[first]  # so that it is let in
        try:
            address = ring.addresses[second]
            link = StepLink(await dial(stranger, Address(address.host, address.port, address.public_key)))
            forged = Step(epoch=1, lane=0, number=1, stage=1, width=1, start=(0,), first_slot=0)
            await link.send(encode(forged), bytes(48 * 4))

            async def take(step: Step, data: bytes) -> None:
                raise AssertionError("nothing is sent to it")

            with pytest.raises(NetworkError):
                await link.run(take)
        finally:
            del ring.nodes[stranger.public_key]
        assert {one.finish for one in await drawing} == {"length"}
        assert not ring.lost


async def test_a_caller_who_goes_frees_the_place(deep: Path) -> None:
    request = SampleRequest(PROMPTS[0], SamplingParams(max_tokens=200, temperature=0.0))
    async with ring_of(deep, [2]) as ring:
        drawing = asyncio.create_task(ring.engine.sample(request))
        await after(ring, 5)
        drawing.cancel()
        await until(lambda: not ring.engine.stats().live)


async def test_beginnings_are_kept_on_the_stages(deep: Path, deep_reference: Any) -> None:
    """A conversation's next turn finds its lane and what was computed; when a stage dies, nothing of it is believed."""
    asked = requests(temperature=0.0)
    expected = await local_draws(deep, asked)
    turns = [SampleRequest((*p, *done.token_ids, 40 + n), asked[0].params) for n, (p, done) in enumerate(
        zip(PROMPTS, expected, strict=True)
    )]  # fmt: skip
    wanted = await local_draws(deep, turns)
    async with ring_of(deep, [1, 3], lanes=2, prefix_tokens=400) as ring:
        for number, request in enumerate(asked):
            assert_all_same(
                deep_reference, [request], [expected[number]], await draw_all(ring, [request]), uniforms=False
            )
        assert_all_same(deep_reference, turns[-3:], wanted[-3:], await draw_all(ring, turns[-3:]), uniforms=False)
        reused = ring.engine.stats().reused_tokens
        assert reused > 70 and ring.engine.stats().prefix_bytes > 0
        kept = [
            sum(s.shape[-2] for s in lane.values())
            for node in ring.nodes.values()
            for lane in node._stage._kept.values()
        ]  # type: ignore[union-attr]
        assert 0 < max(kept) <= 200 and len(set(kept)) <= 2, "within the budget of each lane, alike on all stages"
        keys = list(ring.nodes)
        await ring.kill(keys[1])
        ring.rings.close("a stage was killed.")
        await ring.assign([keys[0], keys[2]], [2])
        assert_all_same(deep_reference, turns, wanted, await draw_all(ring, turns), uniforms=False)
        assert_all_same(deep_reference, turns, wanted, await draw_all(ring, turns), uniforms=False)
        assert ring.engine.stats().reused_tokens > reused
