"""One optimizer step from one batch of episodes.

    step(episodes) = assemble → forward_backward(batch) → optim_step() → version + 1

Responsibilities: the order of these, the version, the metrics. What each does is elsewhere.

Invariants: the version rises by exactly one with each step, also where nothing could be learnt; a loss or gradient
that is not finite, and a batch without any advantage, leave weights and optimizer as they were and are reported
(`nonfinite`, `groups_skipped`); the same weights, state and episodes give the same result, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal.config.learner import CustomLoss, GspoLoss, Learner
from shoal.engine.grammar import Grammars
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, RecordError, RunError, StorageError
from shoal.learner.batch import StepSummary, assemble, fits
from shoal.learner.checkpoint import Checkpoint
from shoal.learner.forward import Policy, prepare
from shoal.learner.loading import no_progress_bars
from shoal.learner.lora import adapters_off, add_adapters, merged_by_name, merged_tensors
from shoal.learner.losses.common import LossOutput, RatioStats, TokenInputs
from shoal.learner.losses.custom import custom_loss, find_loss
from shoal.learner.losses.grpo import grpo_loss
from shoal.learner.losses.gspo import gspo_loss
from shoal.learner.losses.normalisation import Denominators, token_weights
from shoal.learner.optimizer import MasterAdamW, OptimizerStep, learning_rate
from shoal.learner.packing import MicroBatch, pack
from shoal.learner.parts import own_part, parts_of, whole_parameters, whole_state
from shoal.learner.ranks import Ranks
from shoal.learner.sharding import deal, row_tokens, shard
from shoal.protocol.episode import Episode

StepMetrics = dict[str, float]


@dataclass(frozen=True)
class StepBatch:
    """What `forward_backward` takes: the micro-batches of a step, its denominators, and what was left out."""

    micro_batches: tuple[MicroBatch, ...]
    denominators: Denominators
    summary: StepSummary
    num_refused: int
    """Episodes that this model can't have made: a token outside its vocabulary or its turn's grammar, or more than its
    context holds."""


@dataclass(frozen=True)
class PassResult:
    """What `forward_backward` found."""

    loss: float
    stats: RatioStats

    def __add__(self, other: PassResult) -> PassResult:
        return PassResult(self.loss + other.loss, self.stats + other.stats)

    def over(self, ranks: Ranks) -> PassResult:
        """What all ranks found together."""
        found = ranks.gathered([self.loss, *astuple(self.stats)])
        each = [PassResult(loss, RatioStats(int(tokens), *rest)) for loss, tokens, *rest in found]
        return sum(each[1:], each[0])


class Trainer:
    """A policy and its optimizer.

    Args:
        model: a causal language model on its device; trained in place.
        settings: the `[learner]` table.
        total_steps: of the whole run; needed where the learning rate falls towards its end.
        max_response_tokens: the constant of the `dr_grpo` normalisation; needed for that one only.
        version: the policy version that `model` is.
        tokenizer: the model's; needed where episodes are constrained by grammars.
        ranks: the processes that share the work, each with a part of the weights; all call the same methods with the
            same arguments (`leading`, `following`).

    Raises:
        ModelError: the model's type can't be trained here.
        ConfigError: the settings ask for something that does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Learner,
        *,
        total_steps: int = 0,
        max_response_tokens: int = 0,
        version: int = 0,
        tokenizer: Tokenizer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        prepare(model)
        if settings.loss.normalisation == "dr_grpo" and max_response_tokens < 1:
            raise ConfigError("normalisation = 'dr_grpo' needs the token limit of a response.")
        if settings.lr_schedule != "constant" and total_steps < 1:
            raise ConfigError(f"lr_schedule = '{settings.lr_schedule}' needs the number of steps.")
        if isinstance(settings.loss, CustomLoss):
            find_loss(settings.loss.function)  # before the first batch is waited for
        self.model = model
        self.dtype: torch.dtype = model.dtype
        """What is computed in, and published."""
        self.settings = settings
        self._ranks = ranks
        self._total_steps = total_steps
        self.version = version
        self._max_response_tokens = max_response_tokens
        self._tokenizer = tokenizer
        self._policy = Policy(model)
        self._reference: Policy | None = None
        if settings.lora is not None:
            add_adapters(model, settings.lora)
        elif settings.loss.kl_beta > 0:
            self._reference = Policy(copy.deepcopy(model).requires_grad_(False))
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if settings.lora is not None:
                model.enable_input_require_grads()
        self._dtypes = {name: parameter.dtype for name, parameter in self.trainable().items()}
        if ranks is not None:
            self._split(ranks)
        self.optimizer = MasterAdamW(
            self.trainable(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            kind=settings.optimizer,
            total_norm=float if ranks is None else ranks.norm,
        )

    def _split(self, ranks: Ranks) -> None:
        """Leave this process its part of the weights; those that are trained become fp32."""
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()
        for policy in filter(None, (self._policy, self._reference)):
            shard(policy, ranks, self.dtype)

    def _learning_rate(self) -> float:
        settings = self.settings
        return learning_rate(
            settings.lr,
            settings.warmup_steps,
            self.version,
            schedule=settings.lr_schedule,
            total_steps=self._total_steps,
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters being trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, episodes: Sequence[Episode]) -> StepMetrics:
        """Make version + 1 from whole groups of episodes, and say how it went."""
        started = time.perf_counter()
        batch = self.batch(episodes)
        result = self.forward_backward(batch)
        lr = self._learning_rate()
        outcome = self.optim_step()
        metrics = self._metrics(batch, result, outcome, lr)
        metrics["train_s"] = time.perf_counter() - started
        return metrics

    def batch(self, episodes: Sequence[Episode]) -> StepBatch:
        """Advantages, trajectories and micro-batches of one step."""
        config = self.model.config
        usable = [e for e in episodes if fits(e, config.vocab_size, config.max_position_embeddings) and self._allows(e)]
        kept, summary = assemble(usable, self.settings.advantage, skip=self.settings.skip_zero_advantage)
        denominators = Denominators(summary.num_episodes, summary.num_tokens, self._max_response_tokens)
        rows = pack(kept, self.settings.microbatch_tokens)
        if self._ranks is not None and len(rows) < self._ranks.size:
            total = sum(len(row.input_ids) for row in rows)
            rows = pack(kept, row_tokens(total, self._ranks.size, self.settings.microbatch_tokens))
        return StepBatch(tuple(rows), denominators, summary, len(episodes) - len(usable))

    @cached_property
    def _grammars(self) -> Grammars:
        if self._tokenizer is None:
            raise RunError("episodes are constrained by a grammar, and the learner has no tokenizer to read it with.")
        return Grammars(self._tokenizer.hf, self._tokenizer.end_ids)

    def _allows(self, episode: Episode) -> bool:
        """Whether every completion matches what it had to; an episode comes from another machine."""
        return all(
            turn.grammar is None or self._grammars.allows(turn.grammar, turn.completion.token_ids)
            for turn in episode.turns
        )

    def _allowed(self, micro: MicroBatch) -> NDArray[np.uint8] | None:
        """Which tokens could be drawn for each target, packed; None where all of them could, everywhere."""
        if not micro.grammars:
            return None
        vocab_size = self.model.config.vocab_size
        rows = np.full((len(micro.targets), (vocab_size + 7) // 8), 255, dtype=np.uint8)
        for first, length, grammar in micro.grammars:
            part = slice(first, first + length)
            rows[part] = self._grammars.masks(grammar, micro.targets[part].tolist(), vocab_size)
        return rows

    def forward_backward(self, batch: StepBatch) -> PassResult:
        """Add the gradients of the step's loss to the optimizer's; stops at the first loss that is not finite.

        Of several ranks each computes its rows, to the end in any case: the others wait for it in every pass.
        """
        self.model.train()
        result = PassResult(0.0, RatioStats())
        ranks = self._ranks
        dealt = [(micro, True) for micro in batch.micro_batches]
        for micro, counts in dealt if ranks is None else deal(batch.micro_batches, ranks.rank, ranks.size):
            output = self._loss(micro, batch.denominators)
            loss = float(output.loss.detach())
            if counts:
                result += PassResult(loss, output.stats)
            if ranks is None and not math.isfinite(loss):
                break
            (output.loss if counts else 0.0 * output.loss).backward()
            self.optimizer.accumulate()
        if ranks is not None:
            result = result.over(ranks)
        if not math.isfinite(result.loss):
            self.optimizer.zero_grad()
        return result

    def optim_step(self) -> OptimizerStep:
        """Apply the gathered gradients, if there are any and they are finite; the version rises in any case."""
        lr = self._learning_rate()
        outcome = self.optimizer.step(lr)
        self.version += 1
        return outcome

    def _loss(self, micro: MicroBatch, denominators: Denominators) -> LossOutput:
        settings = self.settings.loss
        allowed = self._allowed(micro)
        # The reference first: a pass between another and its gradient would gather and drop what that one still needs.
        reference = self._reference_logprobs(micro, allowed) if settings.kl_beta > 0 else None
        logprobs, entropy = self._policy(micro, allowed, self.settings.gradient_checkpointing)
        weights = token_weights(settings.normalisation, micro.lengths, denominators)

        def on_device(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(logprobs.device)

        behaviour = on_device(micro.behaviour).float()
        inputs = TokenInputs(
            logprobs=logprobs,
            # Nobody drew an expert's tokens: π itself stands for μ, and their ratio is 1 with its gradient.
            behaviour=torch.where(behaviour.isnan(), logprobs.detach(), behaviour),
            advantages=on_device(micro.advantages).float(),
            weights=on_device(weights).float(),
            sequence=on_device(micro.sequence),
            num_sequences=len(micro.members),
            reference=reference,
        )
        if isinstance(settings, CustomLoss):
            return custom_loss(inputs, settings, entropy)
        if isinstance(settings, GspoLoss):
            return gspo_loss(inputs, settings, entropy)
        return grpo_loss(inputs, settings, entropy)

    @torch.no_grad()
    def _reference_logprobs(self, micro: MicroBatch, allowed: NDArray[np.uint8] | None) -> Tensor:
        if self._reference is not None:
            logprobs: Tensor = self._reference(micro, allowed)[0]
            return logprobs
        self.model.eval()
        with adapters_off(self.model):
            logprobs = self._policy(micro, allowed)[0]
        self.model.train()
        return logprobs

    def _metrics(self, batch: StepBatch, result: PassResult, outcome: OptimizerStep, lr: float) -> StepMetrics:
        """Every key is always there and finite; ratios of a step that trained no token are 1, its averages 0."""
        summary, stats = batch.summary, result.stats
        tokens = max(stats.tokens, 1)
        staleness = [self.version - 1 - oldest for oldest in summary.oldest_versions] or [0]
        metrics = {
            "reward": summary.reward_mean,
            "reward_std": summary.reward_std,
            "loss": result.loss,
            "grad_norm": outcome.grad_norm,
            "lr": lr,
            "entropy": stats.entropy_sum / tokens,
            "reference_kl": stats.reference_k3_sum / tokens,
            "mismatch_kl": stats.k3_sum / tokens,
            "mismatch_k1": stats.k1_sum / tokens,
            "ratio_mean": stats.ratio_sum / tokens if stats.tokens else 1.0,
            "ratio_max": stats.ratio_max if stats.tokens else 1.0,
            "ratio_min": stats.ratio_min if stats.tokens else 1.0,
            "clip_fraction": stats.clipped / tokens,
            "response_tokens_mean": summary.num_tokens / max(summary.num_episodes, 1),
            "tokens": float(summary.num_tokens),
            "trained_tokens": float(stats.tokens),
            "packed_tokens": float(sum(len(micro.input_ids) for micro in batch.micro_batches)),
            "groups": float(summary.num_groups),
            "groups_skipped": float(summary.num_groups_skipped),
            "episodes_refused": float(batch.num_refused),
            "staleness_mean": sum(staleness) / len(staleness),
            "staleness_max": float(max(staleness)),
            "applied": float(outcome.applied),
        }
        nonfinite = not math.isfinite(result.loss) or not math.isfinite(outcome.grad_norm)
        metrics = {key: value if math.isfinite(value) else 0.0 for key, value in metrics.items()}
        return {**metrics, "nonfinite": float(nonfinite)}

    def tensors(self) -> dict[str, Tensor]:
        """The policy by state-dict names, adapters merged, tied weights once, in the model's dtype.

        Without LoRA these are the live weights: copy or encode them before the next step. Of several ranks the leader
        gets them, whole.
        """
        if self._ranks is None:
            return merged_tensors(self.model)
        everything = dict(self.model.named_parameters())
        found = whole_parameters(everything, dict.fromkeys(everything, self.dtype), self._ranks)
        return found if self.settings.lora is None else merged_by_name(found, self.settings.lora)

    def trained(self) -> dict[str, Tensor]:
        """The parameters being trained, by name, whole; of several ranks for the leader."""
        return whole_parameters(self.trainable(), self._dtypes, self._ranks)

    def checkpoint(self, extra: Mapping[str, bytes] | None = None) -> Checkpoint:
        """All that `restore` needs, as live tensors: save it before the next step. `extra` are the caller's files.

        Several ranks make what one process would, and one can go on from it, or any number; the leader gets it.
        """
        weights = whole_parameters(self.trainable(), self._dtypes, self._ranks)
        state = self.optimizer.state_dict()
        if self._ranks is not None:
            state = whole_state(state, self.trainable(), self._dtypes, self._ranks)
        return Checkpoint(self.version, weights, state, extra=extra or {})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was taken: weights, optimizer, version, and this process's random state.

        Raises:
            StorageError: it is of another model or of other settings.
        """
        own = self.trainable()
        shapes = {name: parameter.shape for name, parameter in own.items()}
        if shapes != {name: tensor.shape for name, tensor in checkpoint.weights.items()}:
            raise StorageError(
                "the checkpoint is of another model, or of other LoRA settings.", "Resume with the run's own settings."
            )
        weights, state = checkpoint.weights, checkpoint.optimizer
        if self._ranks is not None:
            weights, state = parts_of(checkpoint, self._ranks)
        try:
            self.optimizer.load_state_dict(state)
        except RecordError as error:
            raise StorageError(f"the checkpoint does not fit: {error}", "Resume with the run's own settings.") from None
        for name, parameter in own.items():
            own_part(parameter).copy_(weights[name])
        self.version = checkpoint.version
        checkpoint.random.restore()

    def save_pretrained(self, directory: Path, tokenizer: Any = None) -> None:
        """Write the policy, adapters merged, in Hugging Face format, and its tokenizer if given."""
        # A second, empty body takes the tensors as they are: nothing is initialised, and no random number is drawn.
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.model.config), dtype=self.dtype, attn_implementation="sdpa"
            )
        own = {name: value.cpu() for name, value in self.tensors().items()}
        plain.load_state_dict(own, strict=False, assign=True)
        plain.tie_weights()
        if self.model.generation_config is not None:
            plain.generation_config = copy.deepcopy(self.model.generation_config)
        with no_progress_bars():
            plain.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
