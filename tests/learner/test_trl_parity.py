"""Our losses and TRL's own code, on the same tensors: values and gradients.

TRL's `GRPOTrainer._compute_loss` runs as it is installed, on a trainer object that has the attributes it reads and
was given log-probabilities instead of a model.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import random_episodes, tiny_model
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from shoal.config.learner import Advantage, AsyncLearner, GrpoLoss, GspoLoss, ProximalImportance
from shoal.learner.losses import TokenInputs, grpo_loss, gspo_loss, token_weights
from shoal.learner.losses.normalisation import Denominators
from shoal.learner.trainer import Trainer

MAX_LENGTH = 40


class TrlShell(GRPOTrainer):  # type: ignore[misc]
    """A GRPOTrainer that skips loading models and data, and gets its log-probabilities from the test."""

    def __init__(self, logprobs: Tensor, loss: GrpoLoss | GspoLoss, max_length: int = MAX_LENGTH) -> None:
        self.logprobs = logprobs
        self.loss_type = loss.normalisation
        self.epsilon_low, self.epsilon_high = loss.eps_low, loss.eps_high
        self.beta = loss.kl_beta
        self.importance_sampling_level = "sequence" if isinstance(loss, GspoLoss) else "token"
        self.use_vllm = self.vllm_importance_sampling_correction = isinstance(loss.importance, ProximalImportance)
        self.args = SimpleNamespace(delta=loss.delta, use_bias_correction_kl=False, steps_per_generation=1)
        self.max_completion_length = max_length
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        )
        self.current_gradient_accumulation_steps = 1
        self.top_entropy_quantile = 1.0
        self.off_policy_mask_threshold = None
        self._entropy_bonus_enabled = self.aux_loss_enabled = False
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        return self.logprobs, torch.zeros_like(self.logprobs.detach()), None


def ragged_case(seed: int, spread: float) -> dict[str, Tensor]:
    """Log-probabilities whose ratios reach far from 1, ragged masks with holes, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 7, 13

    def normal() -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(rows, width, generator=generator) < 0.8)
    mask[:, 0] = True
    logprobs = -1.5 + normal()
    return {
        "logprobs": logprobs,
        "behaviour": logprobs + spread * normal(),
        "proximal": logprobs + 0.3 * spread * normal(),
        "reference": logprobs + 0.5 * normal(),
        "mask": mask,
        "advantages": torch.randn(rows, generator=generator, dtype=torch.float64),
    }


def trl_loss(case: dict[str, Tensor], loss: GrpoLoss | GspoLoss) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities, [B, T]."""
    logprobs = case["logprobs"].clone().requires_grad_()
    mask = case["mask"].long()
    proximal = isinstance(loss.importance, ProximalImportance)
    inputs = {
        "prompt_ids": torch.ones(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": case["proximal"] if proximal else case["behaviour"],
        "ref_per_token_logps": case["reference"],
        "num_items_in_batch": mask.sum(),
    }
    if isinstance(loss.importance, ProximalImportance):
        ratio = torch.exp(case["proximal"] - case["behaviour"])
        inputs["importance_sampling_ratio"] = ratio.clamp(max=loss.importance.cap)
    value = TrlShell(logprobs, loss)._compute_loss(None, inputs)
    (gradient,) = torch.autograd.grad(value, logprobs)
    return value.detach(), gradient


def our_loss(case: dict[str, Tensor], loss: GrpoLoss | GspoLoss, *, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Ours, with the rows cut into `parts` micro-batches whose losses are added."""
    logprobs = case["logprobs"].clone().requires_grad_()
    mask = case["mask"]
    denominators = Denominators(sequences=len(mask), tokens=int(mask.sum()), constant_length=MAX_LENGTH)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(mask)).tensor_split(parts):
        m = mask[rows]
        counts = m.sum(dim=1)
        lengths = counts.repeat_interleave(counts).numpy()
        inputs = TokenInputs(
            logprobs=logprobs[rows][m],
            behaviour=case["behaviour"][rows][m],
            advantages=case["advantages"][rows].repeat_interleave(counts),
            weights=torch.from_numpy(token_weights(loss.normalisation, lengths, denominators)),
            sequence=torch.arange(len(rows)).repeat_interleave(counts),
            num_sequences=len(rows),
            proximal=case["proximal"][rows][m],
            reference=case["reference"][rows][m],
        )
        output = gspo_loss(inputs, loss) if isinstance(loss, GspoLoss) else grpo_loss(inputs, loss)
        total = total + output.loss
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.detach(), gradient


LOSSES = {
    "token-level": GrpoLoss(),
    "sequence mean": GrpoLoss(normalisation="grpo"),
    "batch mean": GrpoLoss(normalisation="bnpo"),
    "constant length": GrpoLoss(normalisation="dr_grpo"),
    "asymmetric clip": GrpoLoss(eps_low=0.1, eps_high=0.4),
    "two-sided clip": GrpoLoss(delta=1.8),
    "two-sided, sequence mean": GrpoLoss(delta=1.3, normalisation="grpo"),
    "KL": GrpoLoss(kl_beta=0.07),
    "KL, constant length": GrpoLoss(kl_beta=0.5, normalisation="dr_grpo", delta=2.5),
    "truncated importance": GrpoLoss(importance=ProximalImportance(cap=1.5)),
    "truncated importance, KL": GrpoLoss(importance=ProximalImportance(cap=2.0), kl_beta=0.1, normalisation="grpo"),
    "GSPO": GspoLoss(),
    "GSPO, wide clip": GspoLoss(eps_low=0.2, eps_high=0.3, delta=1.5),
    "GSPO, KL": GspoLoss(eps_low=0.1, eps_high=0.1, kl_beta=0.1),
    "GSPO, token-level": GspoLoss(eps_low=0.1, eps_high=0.1, normalisation="dapo"),
    "GSPO, truncated importance": GspoLoss(eps_low=0.1, eps_high=0.1, importance=ProximalImportance(cap=1.2)),
}


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0], ids=["near", "off", "far"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_loss_and_gradient_equal_trl(loss: GrpoLoss | GspoLoss, spread: float) -> None:
    for seed in range(5):
        case = ragged_case(seed, spread)
        value, gradient = our_loss(case, loss)
        trl_value, trl_gradient = trl_loss(case, loss)
        torch.testing.assert_close(value, trl_value, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-9)


def test_ratios_in_the_cases_are_far_from_one() -> None:
    case = ragged_case(0, 3.0)
    ratio = torch.exp(case["logprobs"] - case["behaviour"])[case["mask"]]
    assert ratio.max() > 50
    assert ratio.min() < 0.02


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_micro_batches_add_up_to_the_step(loss: GrpoLoss | GspoLoss) -> None:
    case = ragged_case(3, 1.0)
    whole, whole_gradient = our_loss(case, loss)
    for parts in (2, 3, 7):
        value, gradient = our_loss(case, loss, parts=parts)
        torch.testing.assert_close(value, whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalisation", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_a_whole_step_through_a_model_equals_trl(normalisation: Any) -> None:
    """Advantages, packing, forward, loss and backward against padded rows, plain transformers, and TRL's loss."""
    loss = GrpoLoss(normalisation=normalisation, delta=4.0)
    settings = AsyncLearner(loss=loss, microbatch_tokens=32, advantage=Advantage(delta=1e-4))
    episodes = random_episodes(5, groups=4, size=4)
    trainer = Trainer(tiny_model("llama"), settings, max_response_tokens=MAX_LENGTH)
    result = trainer.forward_backward(trainer.batch(episodes))

    model = tiny_model("llama")
    width = max(len(e.turns[0].completion.token_ids) for e in episodes)
    rows, mask, behaviour = [], [], torch.zeros(len(episodes), width)
    for number, e in enumerate(episodes):
        prompt, drawn = e.turns[0].context_ids, e.turns[0].completion.token_ids
        logits = model(torch.tensor([[*prompt, *drawn]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(drawn)[:, None])[:, 0]
        rows.append(torch.cat((chosen, chosen.new_zeros(width - len(drawn)))))
        mask.append([1] * len(drawn) + [0] * (width - len(drawn)))
        behaviour[number, : len(drawn)] = torch.tensor(e.turns[0].completion.logprobs)
    logprobs = torch.stack(rows)
    rewards = torch.tensor([e.reward for e in episodes]).view(4, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    completion_mask = torch.tensor(mask)
    inputs = {
        "prompt_ids": torch.ones(16, 1, dtype=torch.long),
        "prompt_mask": torch.ones(16, 1, dtype=torch.long),
        "completion_ids": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "advantages": advantages,
        "old_per_token_logps": behaviour,
        "num_items_in_batch": completion_mask.sum(),
    }
    value = TrlShell(logprobs, loss)._compute_loss(None, inputs)
    value.backward()
    assert result.loss == pytest.approx(float(value.detach()), rel=1e-5)
    ours = trainer.trainable()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        np.testing.assert_allclose(ours[name].grad.numpy(), parameter.grad.numpy(), rtol=1e-4, atol=1e-5 * scale)
