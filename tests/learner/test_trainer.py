"""A step: what moves, what is reported, and what must not move."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import VOCAB, completion, episode, random_episodes, random_ids, tiny_model
from msgspec.structs import replace
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.config.learner import Advantage, AsyncLearner, GrpoLoss, GspoLoss, Lora, ProximalImportance, PullLearner
from shoal.errors import ConfigError
from shoal.learner.batch import assemble
from shoal.learner.forward import response_logprobs
from shoal.learner.packing import pack
from shoal.learner.trainer import Trainer
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Completion

METRICS = {
    "reward", "reward_std", "loss", "grad_norm", "lr", "entropy", "reference_kl", "mismatch_kl", "ratio_mean",
    "ratio_max", "clip_fraction", "response_tokens_mean", "tokens", "packed_tokens", "groups", "groups_skipped",
    "train_s", "staleness_mean", "staleness_max", "nonfinite",
}  # fmt: skip


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.tensors().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def on_policy(trainer: Trainer, episodes: list[Episode]) -> list[Episode]:
    """The same episodes with the log-probabilities that the trainer's own weights give."""
    found = []
    for number, item in enumerate(episodes):
        own, _ = assemble([item], Advantage(), skip=False)
        (row,) = pack(own, 1)
        with torch.no_grad():
            logprobs = response_logprobs(trainer.model, row)[0].clamp(max=0).tolist()
        turns, used = [], 0
        for turn in item.turns:
            count = len(turn.completion.token_ids)
            drawn = turn.completion
            turns.append(
                Turn(
                    context_ids=turn.context_ids,
                    observation="",
                    completion=Completion(
                        token_ids=drawn.token_ids,
                        logprobs=tuple(logprobs[used : used + count]),
                        versions=drawn.versions,
                        finish=drawn.finish,
                        text="",
                    ),
                )
            )
            used += count
        found.append(episode(item.group, number, turns, item.reward, temperature=item.temperature))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss", [GrpoLoss(), GrpoLoss(importance=ProximalImportance()), GspoLoss(), GrpoLoss(kl_beta=0.1)]
)
def test_a_step_moves_every_weight_and_reports_every_metric(dtype: torch.dtype, loss: Any) -> None:
    trainer = Trainer(tiny_model(dtype=dtype), AsyncLearner(lr=1e-2, loss=loss), version=5)
    before = snapshot(trainer)
    metrics = trainer.step(random_episodes(0, version=3))
    assert metrics.keys() >= METRICS
    assert all(math.isfinite(value) for value in metrics.values())
    assert trainer.version == 6
    assert metrics["nonfinite"] == 0
    assert metrics["staleness_max"] == 2
    after = trainer.tensors()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_metrics_count_what_was_given() -> None:
    episodes = random_episodes(0, groups=4, size=4)
    trainer = Trainer(tiny_model(), AsyncLearner(lr=0.0, warmup_steps=0))
    metrics = trainer.step(episodes)
    tokens = sum(e.num_tokens for e in episodes)
    assert metrics["tokens"] == tokens
    assert metrics["response_tokens_mean"] == tokens / 16
    assert metrics["groups"] == 4
    assert metrics["reward"] == pytest.approx(np.mean([e.reward for e in episodes]))
    stds = [np.std([e.reward for e in episodes[g : g + 4]], ddof=1) for g in range(0, 16, 4)]
    assert metrics["reward_std"] == pytest.approx(np.mean(stds))
    assert metrics["groups_skipped"] == sum(std == 0 for std in stds)


@pytest.mark.parametrize("skips", [True, False])
def test_a_group_without_advantage_trains_only_where_it_is_asked_for(skips: bool) -> None:
    episodes = [replace(e, reward=1.0) for e in random_episodes(0, groups=2, size=4)]
    settings = AsyncLearner(lr=1e-2, loss=GrpoLoss(kl_beta=0.1), skip_zero_advantage=skips)
    trainer = Trainer(tiny_model(), settings)
    next(iter(trainer.trainable().values())).data.mul_(1.1)  # away from the reference
    metrics = trainer.step(episodes)
    assert (metrics["groups_skipped"], metrics["applied"]) == ((2, 0) if skips else (0, 1))


def test_with_unchanged_weights_every_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    trainer = Trainer(tiny_model(), AsyncLearner(lr=1e-3))
    episodes = on_policy(trainer, random_episodes(2, max_turns=2, temperature=0.7))
    metrics = trainer.step(episodes)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-4)
    assert metrics["mismatch_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0
    again = trainer.step(episodes)
    assert again["ratio_max"] > 1 + 1e-4


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_steps_are_deterministic(lora: Lora | None) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        trainer = Trainer(tiny_model(dtype=torch.bfloat16), AsyncLearner(lr=1e-2, lora=lora))
        metrics = [trainer.step(random_episodes(seed)) for seed in range(3)]
        for m in metrics:
            del m["train_s"]
        results.append((metrics, snapshot(trainer)))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1], results[1][1])


def test_the_cut_into_micro_batches_does_not_change_the_step() -> None:
    episodes = random_episodes(3, groups=6, size=5, max_turns=2)
    found = []
    for limit in (16, 64, 4096):
        trainer = Trainer(tiny_model(), AsyncLearner(lr=1e-2, microbatch_tokens=limit, loss=GspoLoss()))
        batch = trainer.batch(episodes)
        result = trainer.forward_backward(batch)
        found.append((len(batch.micro_batches), result, {n: p.grad.clone() for n, p in trainer.trainable().items()}))
    assert found[0][0] > found[1][0] > found[2][0] == 1
    for _, result, gradients in found[:2]:
        assert result.loss == pytest.approx(found[2][1].loss, rel=1e-5)
        assert result.stats.tokens == found[2][1].stats.tokens
        assert result.stats.k3_sum == pytest.approx(found[2][1].stats.k3_sum, rel=1e-4)
        for name, gradient in found[2][2].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_skipped_groups_leave_the_gradient_as_it_was() -> None:
    """A group without advantage counts in the denominators whether it is computed or not."""
    rng = random.Random(0)
    mixed = random_episodes(1, groups=2)
    turn = Turn(context_ids=(5, 6), observation="", completion=completion((7, 8, 9), rng))
    same = [episode("same", k, [turn], 0.5) for k in range(4)]
    for normalisation in ("dapo", "grpo"):
        trainer = Trainer(tiny_model(), AsyncLearner(loss=GrpoLoss(normalisation=normalisation)))
        batch = trainer.batch(mixed + same)
        assert batch.summary.num_groups_skipped == 1
        trainer.forward_backward(batch)
        computed = Trainer(tiny_model(), AsyncLearner(loss=GrpoLoss(normalisation=normalisation)))
        kept, summary = assemble(mixed + same, Advantage(), skip=False)
        assert summary.num_groups_skipped == 0
        rows = tuple(pack(kept, 4096))
        computed.forward_backward(type(batch)(rows, batch.denominators, summary, 0))
        for name, parameter in trainer.trainable().items():
            torch.testing.assert_close(parameter.grad, computed.trainable()[name].grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_advantage_raises_the_version_and_nothing_else() -> None:
    trainer = Trainer(tiny_model(dtype=torch.bfloat16), AsyncLearner(lr=1e-2, weight_decay=0.5))
    trainer.step(random_episodes(0))
    before = snapshot(trainer)
    state = {name: value.clone() for name, value in trainer.optimizer.state_dict().items()}
    unanimous = [episode(e.group, e.index, e.turns, 1.0) for e in random_episodes(1, groups=3)]
    metrics = trainer.step(unanimous)
    assert trainer.version == 2
    assert metrics["groups_skipped"] == metrics["groups"] == 3
    assert metrics["packed_tokens"] == metrics["grad_norm"] == metrics["applied"] == 0
    assert metrics["tokens"] > 0
    assert equal(before, trainer.tensors())
    assert equal(state, trainer.optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(place: str, dtype: torch.dtype) -> None:
    trainer = Trainer(tiny_model(dtype=dtype), AsyncLearner(lr=1e-2, microbatch_tokens=16))
    episodes = random_episodes(0, groups=4)
    hook = None
    with torch.no_grad():
        weight = trainer.model.get_input_embeddings().weight
        original = weight.clone()
        if place == "loss":
            weight[episodes[-1].turns[0].completion.token_ids[0]] = float("nan")
    if place == "gradient":
        hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    before = snapshot(trainer)
    metrics = trainer.step(episodes)
    assert metrics["nonfinite"] == 1
    assert metrics["applied"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert trainer.version == 1
    after = trainer.tensors()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    if hook is not None:
        hook.remove()
    with torch.no_grad():
        weight.copy_(original)
    metrics = trainer.step(episodes)
    assert metrics["nonfinite"] == 0
    assert metrics["applied"] == 1


def test_episodes_that_this_model_cannot_have_made_are_refused_and_counted() -> None:
    rng = random.Random(0)
    good = random_episodes(0, groups=2)

    def odd(index: int, context: tuple[int, ...], drawn: tuple[int, ...]) -> Episode:
        turn = Turn(context_ids=context, observation="", completion=completion(drawn, rng))
        return episode("odd", index, [turn], float(index))

    bad = [odd(0, (1, 2), (3, VOCAB)), odd(1, (VOCAB + 5, 2), (3,)), odd(2, (1,) * 512, (3,))]
    alone, mixed = Trainer(tiny_model(), AsyncLearner(lr=1e-2)), Trainer(tiny_model(), AsyncLearner(lr=1e-2))
    expected = alone.step(good)
    metrics = mixed.step([*good, *bad])
    assert metrics["episodes_refused"] == 3
    assert {**metrics, "train_s": 0, "episodes_refused": 0} == {**expected, "train_s": 0}
    assert equal(alone.tensors(), snapshot(mixed))


def test_reward_rises() -> None:
    """A bandit: of two answers the rewarded one becomes near certain, from samples of the policy itself."""
    trainer = Trainer(tiny_model(seed=3), PullLearner(lr=3e-3))
    generator = torch.Generator().manual_seed(0)
    prompt, good = (5, 6, 7), set(range(1, 9))
    shares = []
    for _ in range(25):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt])).logits[0, -1].float()
        log_softmax = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(log_softmax.exp(), 32, replacement=True, generator=generator).tolist()
        episodes = [
            episode(
                "g",
                k,
                [
                    Turn(
                        context_ids=prompt,
                        observation="",
                        completion=Completion(
                            token_ids=(token,),
                            logprobs=(min(float(log_softmax[token]), 0.0),),
                            versions=(trainer.version,),
                            finish="stop",
                            text="",
                        ),
                    )
                ],
                float(token in good),
            )
            for k, token in enumerate(drawn)
        ]
        metrics = trainer.step(episodes)
        assert metrics["ratio_max"] == pytest.approx(1, abs=1e-3)
        shares.append(metrics["reward"])
    assert np.mean(shares[:3]) < 0.5
    assert np.mean(shares[-3:]) > 0.9


def test_the_kl_penalty_holds_the_policy_near_its_reference() -> None:
    def distance(kl_beta: float, lora: Lora | None) -> float:
        torch.manual_seed(0)
        settings = AsyncLearner(lr=5e-3, loss=GrpoLoss(kl_beta=kl_beta, eps_low=1.0, eps_high=9.0), lora=lora)
        trainer = Trainer(tiny_model(), settings)
        episodes = on_policy(trainer, random_episodes(1, groups=2))
        for _ in range(12):
            metrics = trainer.step(episodes)
        return metrics["mismatch_kl"]

    for lora in (None, Lora(rank=8)):
        assert distance(1.0, lora) < 0.5 * distance(0.0, lora)


def test_lora_trains_adapters_only_and_publishes_merged_weights(tmp_path: Path) -> None:
    plain = tiny_model("llama", dtype=torch.bfloat16)
    names = {name for name, _ in plain.named_parameters()}
    trainer = Trainer(tiny_model("llama", dtype=torch.bfloat16), AsyncLearner(lr=5e-2, lora=Lora(rank=4, alpha=8.0)))
    assert all("lora_" in name for name in trainer.trainable())
    start = snapshot(trainer)
    assert start.keys() == names
    assert all(torch.equal(start[name], value) for name, value in plain.named_parameters())
    for seed in range(3):
        trainer.step(random_episodes(seed))
    inside = {name: value.clone() for name, value in trainer.model.named_parameters()}
    merged = snapshot(trainer)
    assert all(torch.equal(value, inside[name]) for name, value in trainer.model.named_parameters())
    moved = {name for name in names if not torch.equal(merged[name], start[name])}
    assert moved == {name for name in names if "_proj" in name}
    trainer.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    # Adapters beside the weights and merged into them round differently in bf16.
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_saved_policy_loads_anywhere_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny_model(kind), AsyncLearner(lr=1e-2))
    trainer.step(random_episodes(0))
    trainer.save_pretrained(tmp_path / "model")
    assert "shoal" not in (tmp_path / "model" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    published = trainer.tensors()
    assert ("lm_head.weight" in published) == (kind != "llama")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in published.items())


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="dr_grpo"):
        Trainer(tiny_model(), AsyncLearner(loss=GrpoLoss(normalisation="dr_grpo")))
    with pytest.raises(ConfigError, match="lora.targets"):
        Trainer(tiny_model(), AsyncLearner(lora=Lora(targets=("no_such_layer",))))
    with pytest.raises(ConfigError, match="lm_head"):
        Trainer(tiny_model(), AsyncLearner(lora=Lora(targets=("lm_head",))))


def test_long_prompts_with_gradient_checkpointing_train_alike() -> None:
    rng = random.Random(0)
    prompt = random_ids(rng, 250)
    episodes = [
        episode("g", k, [Turn(context_ids=prompt, observation="", completion=completion(random_ids(rng, 6), rng))], k)
        for k in range(4)
    ]
    found = []
    for checkpointing in (False, True):
        for lora in (None, Lora(rank=2)):
            torch.manual_seed(0)
            trainer = Trainer(tiny_model(), AsyncLearner(lr=1e-2, gradient_checkpointing=checkpointing, lora=lora))
            found.append((trainer.step(episodes), snapshot(trainer)))
    for plain, again in ((0, 2), (1, 3)):
        assert found[plain][0]["grad_norm"] == pytest.approx(found[again][0]["grad_norm"], rel=1e-5)
        for name, value in found[plain][1].items():
            torch.testing.assert_close(value, found[again][1][name], rtol=1e-4, atol=1e-4)
