"""The packed forward and backward pass against plain transformers, one sequence a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import VOCAB, random_episodes, tiny_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from shoal.config.learner import Advantage
from shoal.errors import ModelError
from shoal.learner import attention
from shoal.learner.batch import Trajectory, assemble
from shoal.learner.forward import prepare, response_logprobs
from shoal.learner.head import chosen_logprobs
from shoal.learner.packing import pack


def reference(model: PreTrainedModel, item: Trajectory) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one trajectory's trained tokens by the ordinary forward pass."""
    logits = model(torch.from_numpy(item.token_ids)[None]).logits[0].float() / item.temperature
    log_softmax = torch.log_softmax(logits, -1)
    at = torch.from_numpy(np.flatnonzero(item.trained))
    chosen = log_softmax[at - 1].gather(1, torch.from_numpy(item.token_ids)[at, None])[:, 0]
    return chosen, -(log_softmax.exp() * log_softmax).sum(-1)[at - 1]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plain_max_keys", [0, 8, 192], ids=["fused", "both", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("limit", [24, 90, 4000])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_packed_equals_one_sequence_a_row(
    kind: str, limit: int, checkpointing: bool, plain_max_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "PLAIN_MAX_KEYS", plain_max_keys)
    episodes = random_episodes(11, groups=3, size=4, max_prompt=12, max_response=9, max_turns=3, temperature=0.8)
    items, _ = assemble(episodes, Advantage(), skip=False)
    packed, plain = tiny_model(kind), tiny_model(kind)
    prepare(packed)
    packed.train()
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
    seen = 0
    for row in pack(items, limit):
        logprobs, entropy = response_logprobs(packed, row, recompute=checkpointing)
        assert not entropy.requires_grad
        expected = [reference(plain, items[m]) for m in row.members]
        torch.testing.assert_close(logprobs, torch.cat([e[0] for e in expected]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), rtol=1e-5, atol=1e-5)
        weights = torch.from_numpy(row.advantages).float()
        (logprobs * weights).sum().backward()
        (torch.cat([e[0] for e in expected]) * weights).sum().backward()
        seen += len(row.targets)
    assert seen == sum(item.num_trained for item in items)
    ours, theirs = gradients(packed), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-5 * float(gradient.abs().max()))


def test_a_prepared_model_still_answers_ordinary_calls() -> None:
    prepared, plain = tiny_model("llama").eval(), tiny_model("llama").eval()
    prepare(prepared)
    ids = torch.randint(1, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    torch.testing.assert_close(
        prepared(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits, rtol=1e-5, atol=1e-5
    )


def test_one_rollout_does_not_see_another() -> None:
    items, _ = assemble(random_episodes(4, groups=2, size=3), Advantage(), skip=False)
    model = tiny_model("llama")
    prepare(model)
    (row,) = pack(items, 1000)
    with torch.no_grad():
        before = response_logprobs(model, row)[0]
        ids = row.input_ids.copy()
        span = row.spans[0]
        start = span.start + span.prefix
        touched = range(start, start + span.lengths[0])
        ids[touched] = (ids[touched] + 1) % VOCAB
        after = response_logprobs(model, replace(row, input_ids=ids))[0]
    others = torch.from_numpy(row.sequence != 0)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_the_head_equals_autograd_over_log_softmax(recompute: bool, temperature: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    count, width, vocab = 600, 16, 50  # more than two chunks
    hidden = (4 * torch.randn(count, width, generator=generator, dtype=torch.float64)).float().requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (count,), generator=generator)
    upstream = torch.randn(count, generator=generator)
    temperatures = None if temperature is None else torch.full((count,), temperature)
    logprobs, entropy = chosen_logprobs(hidden, weight, targets, temperatures, recompute=recompute)
    ours = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    log_softmax = torch.log_softmax(hidden.double() @ weight.double().t() / (temperature or 1.0), -1)
    expected = log_softmax.gather(1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_softmax.exp() * log_softmax).sum(-1), rtol=1e-5, atol=1e-4)
    for mine, reference_gradient in zip(ours, theirs, strict=True):
        scale = float(reference_gradient.abs().max())
        torch.testing.assert_close(mine, reference_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_the_head_keeps_the_gradient_of_a_nearly_certain_token_in_bf16() -> None:
    weight = torch.zeros(8, 4, dtype=torch.bfloat16)
    weight[0, 0] = 7.0
    hidden = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.bfloat16).requires_grad_()
    logprobs, _ = chosen_logprobs(hidden, weight, torch.tensor([0]), None)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    exact = 7.0 * (1 - torch.softmax(torch.tensor([7.0] + [0.0] * 7), 0)[0])
    assert float(gradient[0, 0]) == pytest.approx(float(exact), rel=0.01)


def test_underflow_of_an_unlikely_token_is_no_infinity() -> None:
    weight = torch.tensor([[200.0], [-200.0]])
    logprobs, entropy = chosen_logprobs(torch.ones(1, 1), weight, torch.tensor([1]), None)
    assert float(logprobs) == pytest.approx(-400.0)
    assert float(entropy) == pytest.approx(0.0, abs=1e-4)


def test_models_that_would_be_computed_wrongly_are_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(ModelError, match="gpt2"):
        prepare(other)
    sliding = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=8,
        )
    )
    with pytest.raises(ModelError, match="sliding"):
        prepare(sliding)
