"""Sequences that share a batch are served as if each were alone, within memory, and each exactly once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    END,
    IM_END,
    PLAIN,
    VOCABULARY,
    Caller,
    alone,
    assert_same_draws,
    make_batcher,
    make_checkpoint,
    reference,
    reference_logits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from shoal.engine import batching
from shoal.engine.batching import Batcher
from shoal.engine.cache import GROWTH_TOKENS
from shoal.errors import CapacityError
from shoal.protocol.sampling import SampleRequest, SamplingParams


def prompt_of(length: int, seed: int) -> list[int]:
    stream = random.Random(seed)
    return [stream.randrange(3, VOCABULARY) for _ in range(length)]


def watch_forward(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and width of every forward pass from now on."""
    seen: list[tuple[int, int]] = []
    forward = batcher.model.forward

    def watched(ids: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append((ids.shape[0], ids.shape[1]))
        return forward(ids, *rest, **more)

    monkeypatch.setattr(batcher.model, "forward", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sequences_that_join_and_leave_draw_what_they_draw_alone(
    temperature: float, plain: Path, plain_reference: Any
) -> None:
    stream = random.Random(5)
    caller = Caller(make_batcher(plain, slots=5, endless=True))
    asked: dict[int, tuple[list[int], dict[str, Any]]] = {}
    while len(asked) < 14:
        for _ in range(stream.choice([0, 0, 1, 2, 3])):
            length, most = stream.randrange(1, 60), stream.randrange(1, 25)
            prompt = prompt_of(length, len(asked) // 2)  # neighbours share the beginning of their prompts
            params = {"max_tokens": most, "temperature": temperature, "seed": len(asked)}
            asked[caller.ask(prompt, **params)] = (prompt, params)
        caller.batcher.step()
    done = caller.run()
    assert sorted(done) == sorted(asked)
    for number, (prompt, params) in asked.items():
        completion = done[number]
        assert completion.finish == "length"
        assert_same_draws(plain_reference, prompt, completion, alone(plain, prompt, **params), temperature > 0)
        check_logprobs(plain_reference, prompt, completion.token_ids, completion.logprobs, temperature)


def check_logprobs(
    model: Any, prompt: list[int], ids: tuple[int, ...], logprobs: tuple[float, ...], temperature: float
) -> None:
    logits = reference_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits / (temperature or 1.0), -1)[torch.arange(len(ids)), list(ids)]
    torch.testing.assert_close(torch.tensor(logprobs), wanted, rtol=0, atol=1e-4)
    if temperature == 0:
        assert float((logits.amax(-1) - logits[torch.arange(len(ids)), list(ids)]).max()) < 1e-3


@pytest.mark.parametrize("architecture", ["qwen3", "llama-untied-biases"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_log_probabilities_are_those_of_transformers(architecture: str, temperature: float, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, architecture)
    caller = Caller(make_batcher(directory, endless=True))
    prompts = [prompt_of(n, n) for n in (3, 40, 17)]
    for prompt in prompts:
        caller.ask(prompt, max_tokens=30, temperature=temperature)
    done, peer = caller.run(), reference(directory)
    for number, prompt in enumerate(prompts):
        check_logprobs(peer, prompt, done[number].token_ids, done[number].logprobs, temperature)


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others(plain: Path) -> None:
    caller = Caller(make_batcher(plain, endless=True))
    prompt = prompt_of(12, 0)
    for seed in (7, 7, 8, None, None):
        caller.ask(prompt, max_tokens=20, seed=seed)
    done = caller.run()
    ids = [done[number].token_ids for number in range(5)]
    assert ids[0] == ids[1]
    assert len(set(ids[1:])) == 4


def test_a_groups_prompt_is_computed_once(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = make_batcher(plain, endless=True)
    passes = watch_forward(batcher, monkeypatch)
    caller = Caller(batcher)
    prompt, other = prompt_of(40, 1), prompt_of(23, 2)
    for seed in range(6):
        caller.ask(prompt, max_tokens=9, seed=seed)
    caller.ask(other, max_tokens=9)
    batcher.step()
    assert passes == [(2, 40), (7, 1)]
    # Members that arrive while one of theirs is alive find the prompt in its slot.
    caller.ask(prompt, max_tokens=4, seed=0)
    batcher.step()
    assert passes[2:] == [(8, 1)]
    assert batcher.prompt_tokens == 63
    done = caller.run()
    assert done[7].token_ids == done[0].token_ids[:4]
    # All gone, the prompt has to be computed again.
    caller.ask(prompt, max_tokens=2, seed=0)
    caller.run()
    assert batcher.prompt_tokens == 63 + 40


def test_members_that_join_late_report_exact_log_probabilities(plain: Path, plain_reference: Any) -> None:
    caller = Caller(make_batcher(plain, endless=True))
    prompt = prompt_of(30, 4)
    caller.ask(prompt, max_tokens=12, seed=1)
    for seed in range(2, 6):
        caller.batcher.step()
        caller.ask(prompt, max_tokens=12, seed=seed)
    for completion in caller.run().values():
        check_logprobs(plain_reference, prompt, completion.token_ids, completion.logprobs, 1.0)


def test_a_prompt_computed_with_old_weights_is_not_shared(tmp_path: Path) -> None:
    first, second = (make_checkpoint(tmp_path / str(seed), PLAIN, seed=seed) for seed in (1, 2))
    caller = Caller(make_batcher(first, endless=True))
    prompt = prompt_of(30, 4)
    old = caller.ask(prompt, max_tokens=20, seed=1)
    caller.batcher.step()
    caller.batcher.model.load(load_file(second / "model.safetensors"))
    caller.batcher.version = 1
    new = caller.ask(prompt, max_tokens=10, seed=2)
    done = caller.run()
    assert done[old].versions == (0, 0, *[1] * 18)
    assert done[new].versions == (1,) * 10
    check_logprobs(reference(second), prompt, done[new].token_ids, done[new].logprobs, 1.0)
    check_logprobs(reference(first), prompt, done[old].token_ids[:2], done[old].logprobs[:2], 1.0)


def test_a_cancelled_sequence_frees_its_slot(plain: Path) -> None:
    caller = Caller(make_batcher(plain, slots=2, endless=True))
    prompts = [prompt_of(8, seed) for seed in range(3)]
    for prompt in prompts:
        caller.ask(prompt, max_tokens=20, seed=0)
    caller.batcher.step()
    assert [len(caller.batcher.live), len(caller.batcher.waiting)] == [2, 1]
    caller.running[0].cancelled = True
    caller.batcher.step()
    assert [len(caller.batcher.live), len(caller.batcher.waiting)] == [2, 0]
    done = caller.run()
    assert [done[n].finish for n in range(3)] == ["cancelled", "length", "length"]
    assert len(done[0].token_ids) == 2
    for number in (1, 2):
        assert done[number].token_ids == alone(plain, prompts[number], max_tokens=20, seed=0).token_ids


def test_one_that_is_cancelled_while_it_waits_draws_nothing(plain: Path) -> None:
    caller = Caller(make_batcher(plain, slots=1, endless=True))
    for seed in range(2):
        caller.ask(prompt_of(5, seed), max_tokens=4)
    caller.running[1].cancelled = True
    done = caller.run()
    assert (done[1].finish, done[1].token_ids, done[1].text) == ("cancelled", (), "")
    assert caller.batcher.tokens_drawn == 4


def test_cancelling_everything_completes_everything(plain: Path) -> None:
    caller = Caller(make_batcher(plain, slots=2, endless=True))
    for seed in range(4):
        caller.ask(prompt_of(5, seed), max_tokens=40, min_version=seed // 3)
    caller.batcher.step()
    caller.batcher.cancel_all()
    assert [caller.done[n].finish for n in range(4)] == ["cancelled"] * 4
    assert not caller.batcher.step()


events = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("version"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(events, st.integers(1, 6), st.integers(3, 12))
def test_whatever_happens_each_request_ends_once_and_right(
    plain: Path, plain_reference: Any, todo: list[tuple[str, int, int]], slots: int, blocks: int
) -> None:
    batcher = make_batcher(plain, slots=slots, tokens=blocks * GROWTH_TOKENS, endless=True)
    caller = Caller(batcher)
    prompts: list[list[int]] = []

    def check() -> None:
        assert batcher.cache.bytes <= batcher.cache.budget_bytes
        assert len(batcher.live) <= slots
        for slot, sequence in enumerate(batcher.live):
            assert sequence.length <= batcher.cache.capacity, slot

    version = 0
    for action, number, more in todo:
        if action == "ask":
            prompt = prompt_of(number, number % 3)
            caller.ask(prompt, max_tokens=more, seed=number, min_version=version if more % 5 == 0 else 0)
            prompts.append(prompt)
        elif action == "cancel" and caller.running:
            caller.running[number % len(caller.running)].cancelled = True
        elif action == "version":
            version += more % 2
            batcher.version += 1
        for _ in range(number if action == "step" else 0):
            batcher.step()
            check()
    batcher.version += 1
    while batcher.step():
        check()
    assert len(caller.done) == len(caller.running), "a request was forgotten"
    assert not batcher.live and not batcher.waiting
    for number, completion in caller.done.items():
        sequence = caller.running[number]
        if not sequence.cancelled:
            assert completion.finish == "length"
            assert len(completion.token_ids) == sequence.request.params.max_tokens
        assert all(v >= sequence.request.min_version for v in completion.versions)
        if completion.token_ids:
            check_logprobs(plain_reference, prompts[number], completion.token_ids, completion.logprobs, 1.0)


def test_what_can_never_fit_is_refused_with_what_to_do(plain: Path) -> None:
    batcher = make_batcher(plain, slots=4, tokens=128, context=200)

    def ask(prompt: int, most: int) -> None:
        batcher.check(SampleRequest(tuple(prompt_of(prompt, 0)), SamplingParams(max_tokens=most)))

    ask(64, 64)
    with pytest.raises(CapacityError, match=r"cache.*cache_tokens"):
        ask(65, 64)
    with pytest.raises(CapacityError, match="context of 200 tokens"):
        ask(150, 51)
    with pytest.raises(CapacityError, match="vocabulary"):
        batcher.check(SampleRequest((VOCABULARY,), SamplingParams(max_tokens=1)))


def test_waiting_requests_are_admitted_in_order_as_memory_frees(plain: Path) -> None:
    batcher = make_batcher(plain, slots=16, tokens=4 * GROWTH_TOKENS, endless=True)
    caller = Caller(batcher)
    order: list[int] = []
    for number in range(6):
        asked = caller.ask(prompt_of(4, number), max_tokens=12 + 3 * number)
        caller.running[asked].on_token = lambda _, n=asked: order.append(n) if n not in order else None
    most = 0
    while batcher.step():
        most = max(most, len(batcher.live))
        assert batcher.cache.bytes <= batcher.cache.budget_bytes
    assert most == 4
    assert order == list(range(6))
    assert [len(caller.done[n].token_ids) for n in range(6)] == [12, 15, 18, 21, 24, 27]


def test_what_the_live_ones_may_yet_draw_is_counted(plain: Path) -> None:
    batcher = make_batcher(plain, tokens=4 * GROWTH_TOKENS, endless=True)
    caller = Caller(batcher)
    long = caller.ask(prompt_of(4, 0), max_tokens=3 * GROWTH_TOKENS - 4)
    short = caller.ask(prompt_of(4, 1), max_tokens=4)
    for _ in range(5):
        batcher.step()
    assert len(batcher.live) == 1
    done = caller.run()
    assert list(done) == [long, short]


def test_prompts_admitted_at_once_are_bounded(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 64)
    batcher = make_batcher(plain, endless=True)
    passes = watch_forward(batcher, monkeypatch)
    caller = Caller(batcher)
    for seed in range(4):
        caller.ask(prompt_of(30, seed), max_tokens=5)
    caller.ask(prompt_of(30, 3), max_tokens=5)
    caller.run()
    assert [p for p in passes if p[1] > 1] == [(2, 30), (2, 30)]


def test_end_tokens_stop_strings_and_the_limit(plain: Path, plain_reference: Any) -> None:
    batcher = make_batcher(plain)
    prompt = prompt_of(20, 3)
    free = alone(plain, prompt, max_tokens=60, seed=3, temperature=1.5)
    batcher.tokenizer.end_ids = frozenset({free.token_ids[17]})
    caller = Caller(batcher)
    asked = caller.ask(prompt, max_tokens=60, seed=3, temperature=1.5)
    completion = caller.run()[asked]
    cut = free.token_ids.index(free.token_ids[17]) + 1
    assert (completion.token_ids, completion.finish) == (free.token_ids[:cut], "stop")

    batcher.tokenizer.end_ids = frozenset()
    text = batcher.tokenizer.decode(free.token_ids)
    stop = next(text[i : i + 3] for i in range(8, len(text)) if text[i : i + 3].isascii() and text[i].isprintable())
    asked = caller.ask(prompt, max_tokens=60, seed=3, temperature=1.5, stop=("no such text", stop))
    completion = caller.run()[asked]
    assert completion.finish == "stop"
    assert completion.text == text[: text.index(stop)]
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
    decode = batcher.tokenizer.decode
    assert stop in decode(completion.token_ids) and stop not in decode(completion.token_ids[:-1])

    asked = caller.ask(prompt, max_tokens=5, seed=3, temperature=1.5)
    completion = caller.run()[asked]
    assert (completion.token_ids, completion.finish) == (free.token_ids[:5], "length")


def test_end_tokens_are_those_of_the_checkpoint(plain: Path) -> None:
    assert make_batcher(plain).tokenizer.end_ids == {IM_END}
    assert END != IM_END


def test_a_request_waits_for_its_version_and_holds_up_nobody(plain: Path) -> None:
    caller = Caller(make_batcher(plain, endless=True))
    held = caller.ask(prompt_of(5, 0), max_tokens=3, min_version=2)
    free = caller.ask(prompt_of(5, 1), max_tokens=3)
    done = caller.run()
    assert free in done and held not in done
    caller.batcher.version = 1
    assert not caller.batcher.step()
    caller.batcher.version = 2
    assert caller.run()[held].versions == (2, 2, 2)


def test_weights_that_have_diverged_end_in_errors_and_leave_nothing_behind(plain: Path, plain_reference: Any) -> None:
    batcher = make_batcher(plain, slots=4, endless=True)
    caller = Caller(batcher)
    good = load_file(plain / "model.safetensors")
    bad = {name: torch.full_like(t, float("nan")) if "layers.0.self_attn.k" in name else t for name, t in good.items()}
    long = [caller.ask(prompt_of(30, seed), max_tokens=20) for seed in range(3)]
    for _ in range(3):
        batcher.step()
    batcher.model.load(bad)
    batcher.step()
    assert [caller.done[n].finish for n in long] == ["error"] * 3
    assert all(len(caller.done[n].token_ids) == 4 for n in long)
    late = caller.ask(prompt_of(9, 9), max_tokens=5)
    assert (caller.run()[late].finish, caller.done[late].token_ids) == ("error", ())
    batcher.model.load(good)
    # Shorter ones now sit in slots whose far positions once held what the bad weights wrote.
    again = [caller.ask(prompt_of(4 + 20 * (seed % 2), seed), max_tokens=15) for seed in range(4)]
    done = caller.run()
    for seed, number in enumerate(again):
        assert done[number].finish == "length"
        check_logprobs(
            plain_reference, prompt_of(4 + 20 * (seed % 2), seed), done[number].token_ids, done[number].logprobs, 1.0
        )
