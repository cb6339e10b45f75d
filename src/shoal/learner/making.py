"""A run's trainer, from its configuration: the same on every rank, and where there is one process only."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from shoal.config import Config
from shoal.engine.source import LocalModel, resolve
from shoal.engine.tokenizer import Tokenizer
from shoal.learner.leading import LeadingTrainer, follow
from shoal.learner.loading import load_policy
from shoal.learner.ranks import Ranks, rank_device
from shoal.learner.trainer import Trainer
from shoal.rollout.host import model_cache

log = logging.getLogger("shoal.learner")


def make_trainer(config: Config, local: LocalModel, tokenizer: Tokenizer, ranks: Ranks | None) -> Trainer:
    """A trainer of the model as it was before the run.

    Where it is in parts, each rank reads all of it into its memory first, and moves its part to its device.
    """
    settings = config.learner
    torch.set_num_threads(settings.threads)
    torch.manual_seed(config.run.seed)
    model = load_policy(local, config.model.dtype, settings.device if ranks is None else "cpu")
    steps, tokens = config.run.steps, config.rollout.max_tokens
    if ranks is None:
        return Trainer(model, settings, total_steps=steps, max_response_tokens=tokens, tokenizer=tokenizer)
    kind = LeadingTrainer if ranks.leads else Trainer
    return kind(model, settings, total_steps=steps, max_response_tokens=tokens, tokenizer=tokenizer, ranks=ranks)


def follow_run(config: Config, directory: Path) -> None:
    """Be one of a learner's ranks that do not lead, until the run is over."""
    ranks = Ranks(rank_device(config.learner.device))
    local = resolve(config.model.name, model_cache())
    trainer = make_trainer(config, local, Tokenizer(local.directory), ranks)
    log.info("rank %d of %d", ranks.rank, ranks.size)
    follow(trainer, ranks, directory / "checkpoints")
    ranks.close()
