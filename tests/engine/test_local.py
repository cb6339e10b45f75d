"""The engine as its callers see it: many at once, cancelled, streamed, weights that change, closed, failing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PLAIN, alone, assert_same_draws, local, make_checkpoint, reference, reference_logits
from safetensors.torch import load_file

from shoal.broadcast.tensors import TensorView
from shoal.engine import local as engine_local
from shoal.engine.local import LocalEngine, pick_device
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.errors import CapacityError, ModelError, RecordError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

DEADLINE_S = 60.0


@asynccontextmanager
async def engine_on(directory: Path, *, endless: bool = True, **settings: Any) -> AsyncIterator[LocalEngine]:
    settings = {
        "dtype": "fp32",
        "device": "cpu",
        "max_sequences": 8,
        "cache_tokens": 2048,
        "context_tokens": 256,
    } | settings
    async with asyncio.timeout(DEADLINE_S), LocalEngine(local(directory), **settings) as engine:
        if endless:
            engine.tokenizer.end_ids = frozenset()
        yield engine


def request(prompt: list[int], *, min_version: int = 0, **params: Any) -> SampleRequest:
    return SampleRequest(tuple(prompt), SamplingParams(**params), min_version=min_version)


def views_of(directory: Path) -> Mapping[str, TensorView]:
    return to_views(load_file(directory / "model.safetensors"))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - counters of another thread
        await asyncio.sleep(0.005)


async def test_concurrent_callers_get_what_they_would_get_alone(plain: Path, plain_reference: Any) -> None:
    prompts = [[5 + n, *range(10, 10 + 3 * n)] for n in range(12)]
    async with engine_on(plain) as engine:
        done = await asyncio.gather(
            *(engine.sample(request(p, max_tokens=3 + 2 * n, seed=n)) for n, p in enumerate(prompts))
        )
        stats = engine.stats()
        assert stats.tokens_drawn == sum(3 + 2 * n for n in range(12))
        assert stats.prompt_tokens == sum(map(len, prompts))
        assert (stats.live, stats.waiting) == (0, 0) and stats.busy_s > 0
        assert 0 < stats.cache_bytes <= 2048 * 2 * 2 * 2 * 12 * 4
    for n, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        assert completion.versions == (0,) * (3 + 2 * n)
        assert completion.text == engine.tokenizer.decode(completion.token_ids)
        completion.check()
        assert_same_draws(plain_reference, prompt, completion, alone(plain, prompt, max_tokens=3 + 2 * n, seed=n), True)


async def test_a_swap_in_mid_generation_changes_weights_and_versions(tmp_path: Path) -> None:
    old, new = (make_checkpoint(tmp_path / str(seed), PLAIN, seed=seed) for seed in (1, 2))
    prompt = list(range(10, 30))
    async with engine_on(old) as engine:
        task = asyncio.create_task(engine.sample(request(prompt, max_tokens=200, seed=1)))
        await until(lambda: engine.stats().tokens_drawn > 10)
        pause_s = await engine.load_weights(7, views_of(new))
        assert pause_s > 0 and engine.version == 7
        completion = await task
        after = await engine.sample(request(prompt, max_tokens=10, seed=1, min_version=7))
    swapped = completion.versions.index(7)
    assert 10 < swapped < 200
    assert completion.versions == (0,) * swapped + (7,) * (200 - swapped)
    for directory, ids, logprobs in (
        (old, completion.token_ids[:swapped], completion.logprobs),
        (new, after.token_ids, after.logprobs),
    ):
        logits = reference_logits(reference(directory), [*prompt, *ids])[len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1)[torch.arange(len(ids)), list(ids)]
        torch.testing.assert_close(torch.tensor(logprobs[: len(ids)]), wanted, rtol=0, atol=1e-4)
    assert after.versions == (7,) * 10


async def test_weights_that_wait_for_others_to_end_are_all_answered(plain: Path) -> None:
    async with engine_on(plain, on_swap="finish") as engine:
        running = asyncio.create_task(engine.sample(request([5, 6], max_tokens=200)))
        await until(lambda: engine.stats().tokens_drawn > 0)
        loads = [asyncio.create_task(engine.load_weights(version, views_of(plain))) for version in (1, 2)]
        after = asyncio.create_task(engine.sample(request([5, 6], max_tokens=4, min_version=2)))
        assert set((await running).versions) == {0}
        async with asyncio.timeout(20):
            await asyncio.gather(*loads)
            assert (await after).versions == (2,) * 4


async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(plain: Path) -> None:
    views = dict(views_of(plain))
    name = "model.layers.0.self_attn.q_proj.weight"
    async with engine_on(plain) as engine:
        assert set(engine.tensor_names) == set(views)
        before = await engine.sample(request([5, 6, 7], max_tokens=20, seed=3))
        with pytest.raises(ModelError, match=name):
            await engine.load_weights(3, {k: v for k, v in views.items() if k != name})
        with pytest.raises(ModelError, match=name):
            await engine.load_weights(3, {**views, name: views["model.norm.weight"]})
        assert engine.version == 0
        after = await engine.sample(request([5, 6, 7], max_tokens=20, seed=3))
        assert after == before


async def test_a_request_for_a_later_version_waits_for_its_weights(plain: Path) -> None:
    async with engine_on(plain) as engine:
        waiting = asyncio.create_task(engine.sample(request([5, 6], max_tokens=4, min_version=2)))
        await engine.sample(request([5, 6], max_tokens=4))
        await engine.load_weights(1, views_of(plain))
        await engine.sample(request([5, 6], max_tokens=4))
        assert not waiting.done()
        await engine.load_weights(2, views_of(plain))
        assert (await waiting).versions == (2,) * 4


async def test_a_cancelled_caller_frees_the_slot(plain: Path) -> None:
    async with engine_on(plain, max_sequences=1, context_tokens=256) as engine:
        first = asyncio.create_task(engine.sample(request([5, 6], max_tokens=250)))
        second = asyncio.create_task(engine.sample(request([7, 8], max_tokens=5)))
        await until(lambda: engine.stats().tokens_drawn > 3)
        first.cancel()
        assert len((await second).token_ids) == 5
        assert engine.stats().tokens_drawn < 250
        with pytest.raises(asyncio.CancelledError):
            await first
        # One that waits in an idle engine goes as well.
        held = asyncio.create_task(engine.sample(request([5], max_tokens=1, min_version=9)))
        await until(lambda: engine.stats().waiting == 1)
        held.cancel()
        await until(lambda: engine.stats().waiting == 0)
        await engine.drained()


async def test_streamed_pieces_are_the_completion(plain: Path) -> None:
    async with engine_on(plain) as engine:
        for seed in range(6):
            asked = request([9, 10, 11], max_tokens=40, seed=seed, temperature=1.3)
            whole = await engine.sample(asked)
            pieces = [piece async for piece in engine.stream(asked)]
            assert "".join(pieces) == whole.text
            assert len(pieces) > 5
            text = whole.text
            at = next(i for i in range(len(text) // 2, len(text) - 1) if "\ufffd" not in text[i : i + 2])
            stop = text[at : at + 2]
            pieces = [
                p
                async for p in engine.stream(
                    request([9, 10, 11], max_tokens=40, seed=seed, temperature=1.3, stop=(stop,))
                )
            ]
            assert "".join(pieces) == text[: text.index(stop)], "a piece of the stop string was shown"


async def test_leaving_a_stream_frees_the_slot(plain: Path) -> None:
    async with engine_on(plain, max_sequences=1) as engine:
        stream = engine.stream(request([5, 6], max_tokens=250))
        await anext(stream)
        await stream.aclose()
        assert len((await engine.sample(request([7, 8], max_tokens=5))).token_ids) == 5
        assert engine.stats().tokens_drawn < 250


async def test_requests_that_make_no_sense_or_never_fit(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine_on(plain, cache_tokens=96, context_tokens=64) as engine:
        with pytest.raises(RecordError, match="max_tokens"):
            await engine.sample(request([5], max_tokens=0))
        with pytest.raises(CapacityError, match="context of 64"):
            await engine.sample(request([5] * 60, max_tokens=5))
        with pytest.raises(CapacityError, match="vocabulary"):
            await engine.sample(request([10**6], max_tokens=5))
        with pytest.raises(CapacityError):
            _ = [piece async for piece in engine.stream(request([5] * 64, max_tokens=1))]
        monkeypatch.setattr(engine_local, "MAX_REQUESTS", 1)
        first = asyncio.create_task(engine.sample(request([5], max_tokens=30)))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="1 requests already"):
            await engine.sample(request([6], max_tokens=30))
        assert len((await first).token_ids) == 30


async def test_closing_answers_everyone(plain: Path) -> None:
    async with engine_on(plain, max_sequences=2) as engine:
        tasks = [asyncio.create_task(engine.sample(request([5, n], max_tokens=250))) for n in range(5, 9)]
        tasks.append(asyncio.create_task(engine.sample(request([5], max_tokens=5, min_version=9))))
        await until(lambda: engine.stats().tokens_drawn > 5)
    completions = await asyncio.gather(*tasks)
    assert [c.finish for c in completions] == ["cancelled"] * 5
    assert sum(len(c.token_ids) > 0 for c in completions) == 2
    assert not [t for t in threading.enumerate() if t is engine._thread]
    with pytest.raises(ModelError, match="closed"):
        await engine.sample(request([5], max_tokens=5))
    with pytest.raises(ModelError, match="closed"):
        await engine.load_weights(1, {})
    await engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_failure_of_the_thread_is_told_to_every_caller(plain: Path) -> None:
    async with engine_on(plain) as engine:
        tasks = [asyncio.create_task(engine.sample(request([5, n], max_tokens=250))) for n in (5, 6)]
        await until(lambda: engine.stats().tokens_drawn > 5)
        engine._inbox.put(lambda: [][0])  # a defect, standing for any
        for task in tasks:
            with pytest.raises(ModelError, match="IndexError"):
                await task
        with pytest.raises(ModelError, match="has stopped"):
            await engine.sample(request([5], max_tokens=5))


def test_a_caller_whose_loop_is_gone_harms_nobody(plain: Path) -> None:
    engine = LocalEngine(local(plain), dtype="fp32", device="cpu", context_tokens=256)
    engine.tokenizer.end_ids = frozenset()

    async def leave_at_once() -> None:
        _ = asyncio.create_task(engine.sample(request([5, 6], max_tokens=100)))  # noqa: RUF006 - that it is lost is the point
        await until(lambda: engine.stats().tokens_drawn > 3)

    async def ask() -> Completion:
        async with asyncio.timeout(DEADLINE_S):
            completion = await engine.sample(request([7, 8], max_tokens=120))
            await engine.close()
            return completion

    asyncio.run(leave_at_once())
    assert len(asyncio.run(ask()).token_ids) == 120


async def test_end_tokens_end(plain: Path) -> None:
    async with engine_on(plain, endless=False) as engine:
        done = await asyncio.gather(*(engine.sample(request([5, 6], max_tokens=200, seed=n)) for n in range(24)))
        ended = [c for c in done if c.finish == "stop"]
        assert ended, "no end token in 24 completions"
        for completion in done:
            inner = completion.token_ids[:-1] if completion.finish == "stop" else completion.token_ids
            assert not set(inner) & engine.tokenizer.end_ids
            assert "<|im_end|>" not in completion.text
        assert all(c.token_ids[-1] in engine.tokenizer.end_ids for c in ended)


async def test_bf16_reports_the_log_probabilities_it_drew_with(plain: Path, plain_reference: Any) -> None:
    prompt = list(range(10, 40))
    async with engine_on(plain, dtype="bf16") as engine:
        done = await asyncio.gather(*(engine.sample(request(prompt, max_tokens=30, seed=n)) for n in range(8)))
    errors = []
    for completion in done:
        logits = reference_logits(plain_reference, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1)[torch.arange(30), list(completion.token_ids)]
        errors += (torch.tensor(completion.logprobs) - wanted).abs().tolist()
    assert sum(errors) / len(errors) < 0.05


async def test_the_embedded_model_in_bf16(embedded: LocalModel, embedded_reference: Any) -> None:
    async with asyncio.timeout(300), LocalEngine(embedded, device="cpu") as engine:
        prompt = engine.tokenizer.prompt([Message("user", "What is 7 + 5?")])
        greedy = await engine.sample(request(prompt, max_tokens=24, temperature=0.0))
        drawn = await asyncio.gather(*(engine.sample(request(prompt, max_tokens=24, seed=n)) for n in range(3)))
    differences: list[float] = []
    for completion in (greedy, *drawn):
        ids = list(completion.token_ids)
        logits = reference_logits(embedded_reference, [*prompt, *ids])[len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]
        differences += (torch.tensor(completion.logprobs) - wanted).abs().tolist()
        if completion is greedy:
            # bf16 keeps 8 bits: logits of 25 are 0.125 apart, so near-ties fall either way.
            assert float((logits.amax(-1) - logits[torch.arange(len(ids)), ids]).max()) < 0.5
            assert set("0123456789") & set(completion.text)
    assert sum(differences) / len(differences) < 0.1


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama-grouped-tied", "qwen3-untied-one-key-head"])
async def test_cuda_draws_what_the_cpu_draws(architecture: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture)
    peer = reference(directory)
    prompts = [list(range(10, 10 + n)) for n in (5, 60, 23)]
    torch.backends.cuda.matmul.allow_tf32 = False
    async with engine_on(directory, device="cuda") as engine:
        greedy = [request(p, max_tokens=30, temperature=0.0) for p in prompts]
        done = await asyncio.gather(*map(engine.sample, greedy))
        await engine.load_weights(1, views_of(directory))
        again = await asyncio.gather(*map(engine.sample, greedy))
    for prompt, completion, repeated in zip(prompts, done, again, strict=True):
        cpu = alone(directory, prompt, max_tokens=30, temperature=0.0)
        assert_same_draws(peer, prompt, completion, cpu, False)
        assert_same_draws(peer, prompt, repeated, cpu, False)
        logits = reference_logits(peer, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1)[torch.arange(30), list(completion.token_ids)]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=1e-3)
