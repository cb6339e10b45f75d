"""`shoal sft`: supervised fine-tuning of a model on examples, in one process.

    examples ─ shuffled once an epoch, by the seed ─▶ batches ─▶ loss, step ─▶ metrics ─▶ checkpoint … ─▶ model

Invariants: step n of a run is the same batch whenever it is done, so a run that was killed and goes on from its
checkpoint ends with the same model, bit for bit on a CPU with one thread; held-out examples are never trained on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.config.learner import ColocatedLearner
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import stable_int
from shoal.errors import RunError
from shoal.learner import checkpoint
from shoal.learner.batch import StepSummary, Trajectory
from shoal.learner.forward import response_logprobs
from shoal.learner.loading import load_policy
from shoal.learner.losses.common import LossOutput
from shoal.learner.losses.normalisation import Denominators, token_weights
from shoal.learner.losses.supervised import supervised_loss
from shoal.learner.packing import MicroBatch, pack
from shoal.learner.trainer import StepBatch, StepMetrics, Trainer

Line = dict[str, float | int | str]


@dataclass(frozen=True)
class Plan:
    """How long to learn, and from how much at a time."""

    epochs: int
    batch_size: int
    """Examples of one step."""
    seed: int
    checkpoint_every: int
    """Steps; 0 writes only the last one."""


class SupervisedTrainer(Trainer):
    """The learner's trainer with the likelihood of given tokens as its objective."""

    def learn(self, items: Sequence[Trajectory]) -> StepMetrics:
        """One optimizer step; version + 1."""
        started = time.perf_counter()
        batch = self.given(items)
        lr = self._learning_rate()
        result = self.forward_backward(batch)
        outcome = self.optim_step()
        return {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "entropy": result.stats.entropy_sum / max(1, result.stats.tokens),
            "tokens": float(batch.summary.num_tokens),
            "applied": float(outcome.applied),
            "train_s": time.perf_counter() - started,
        }

    def given(self, items: Sequence[Trajectory]) -> StepBatch:
        """Examples as a step's micro-batches."""
        tokens = sum(item.num_trained for item in items)
        summary = StepSummary(len(items), 0, len(items), tokens, 0.0, 0.0, ())
        rows = tuple(pack(items, self.settings.microbatch_tokens))
        return StepBatch(rows, Denominators(len(items), tokens, 0), summary, 0)

    @torch.no_grad()
    def nll(self, items: Sequence[Trajectory]) -> float:
        """Mean negative log-likelihood of the trained tokens, in nats."""
        self.model.eval()
        total, tokens = 0.0, 0
        for micro in pack(items, self.settings.microbatch_tokens):
            logprobs, _ = response_logprobs(self.model, micro)
            total -= float(logprobs.sum())
            tokens += len(logprobs)
        return total / max(1, tokens)

    def _loss(self, micro: MicroBatch, denominators: Denominators) -> LossOutput:
        logprobs, entropy = response_logprobs(self.model, micro, recompute=self.settings.gradient_checkpointing)
        weights: Tensor = torch.from_numpy(token_weights("dapo", micro.lengths, denominators))
        return supervised_loss(logprobs, weights.float().to(logprobs.device), entropy)


def num_heldout(num_examples: int, share: float) -> int:
    """How many examples are only measured; at least one is left to learn from."""
    return min(num_examples - 1, round(share * num_examples))


def num_steps(num_examples: int, plan: Plan) -> int:
    """Of the whole run."""
    return plan.epochs * math.ceil(num_examples / plan.batch_size)


def fine_tune(
    model: PreTrainedModel,
    settings: ColocatedLearner,
    plan: Plan,
    train: Sequence[Trajectory],
    heldout: Sequence[Trajectory],
    directory: Path,
    on_metrics: Callable[[Line], None],
    on_resume: Callable[[int], None],
) -> SupervisedTrainer:
    """Learn from the examples, from the newest checkpoint in `directory` on where there is one.

    Args:
        on_metrics: given a line after each step, and one with the held-out loss before and after each epoch.
        on_resume: told the steps done by the checkpoint that it goes on from; those after it are done again.

    Raises:
        StorageError: a checkpoint cannot be written, or is of another model.
        RunError: the loss is not finite.
    """
    steps = num_steps(len(train), plan)
    trainer = SupervisedTrainer(model, settings, total_steps=steps)
    newest = checkpoint.load_latest(directory)
    if newest is not None:
        trainer.restore(newest)
        on_resume(trainer.version)
    elif heldout:
        on_metrics({"kind": "eval", "step": 0, "nll": trainer.nll(heldout)})
    per_epoch = math.ceil(len(train) / plan.batch_size)
    while trainer.version < steps:
        epoch, place = divmod(trainer.version, per_epoch)
        order = list(range(len(train)))
        random.Random(stable_int("sft", plan.seed, epoch)).shuffle(order)
        chosen = order[place * plan.batch_size : (place + 1) * plan.batch_size]
        metrics = trainer.learn([train[index] for index in chosen])
        if not math.isfinite(metrics["loss"]):
            raise RunError(f"the loss of step {trainer.version} is not finite.", "Lower --lr.")
        on_metrics({"kind": "step", "step": trainer.version, "epoch": epoch + 1, **metrics})
        last = trainer.version == steps
        if last or (plan.checkpoint_every and trainer.version % plan.checkpoint_every == 0):
            checkpoint.save(directory, trainer.checkpoint(), keep=settings.keep_checkpoints)
        if heldout and place == per_epoch - 1:
            on_metrics({"kind": "eval", "step": trainer.version, "nll": trainer.nll(heldout)})
    return trainer


def run(
    local: LocalModel,
    settings: ColocatedLearner,
    plan: Plan,
    examples: Sequence[Trajectory],
    heldout_share: float,
    directory: Path,
    tokenizer: Tokenizer,
    on_metrics: Callable[[Line], None],
    on_resume: Callable[[int], None],
    *,
    dtype: Literal["bf16", "fp32"] = "bf16",
) -> None:
    """Fine-tune a checkpoint and leave the model in `directory/model`.

    Args:
        heldout_share: of the examples; drawn by the seed.

    Raises:
        ModelError: the model cannot be loaded or trained.
        StorageError, RunError: see `fine_tune`.
    """
    torch.set_num_threads(settings.threads)
    order = list(range(len(examples)))
    random.Random(stable_int("sft-heldout", plan.seed)).shuffle(order)
    cut = num_heldout(len(order), heldout_share)
    heldout = [examples[index] for index in order[:cut]]
    train = [examples[index] for index in order[cut:]]
    model = load_policy(local, dtype, settings.device)
    trainer = fine_tune(model, settings, plan, train, heldout, directory / "checkpoints", on_metrics, on_resume)
    trainer.save_pretrained(directory / "model", tokenizer.hf)
