"""What `test_ranks` has several ranks do: run by torchrun, each rank this very script.

    python -m torch.distributed.run --standalone --nproc-per-node 2 rank_cases.py FOLDER

Every case makes two steps from the same episodes as the test does alone; the leader writes its metrics, its checkpoint
after each step, and its whole tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from learner_cases import random_episodes, tiny_model
from safetensors.torch import save_file

from shoal.config.learner import AsyncLearner, GrpoLoss, GspoLoss, Learner, Lora
from shoal.learner import checkpoint
from shoal.learner.leading import LeadingTrainer, follow
from shoal.learner.ranks import Ranks
from shoal.learner.trainer import Trainer

UNCLIPPED = {"lr": 1e-3, "grad_clip": 1e9, "betas": (0.9, 0.99), "microbatch_tokens": 24}

CASES: dict[str, tuple[str, torch.dtype, Learner]] = {
    "full": ("llama", torch.float32, AsyncLearner(**UNCLIPPED)),
    "by_sequence": ("qwen3", torch.float32, AsyncLearner(**UNCLIPPED, loss=GspoLoss(eps_low=0.9, eps_high=9.0))),
    "lora": ("llama", torch.float32, AsyncLearner(**UNCLIPPED, lora=Lora(rank=4, alpha=8.0))),
    "lora_kl": (
        "qwen2",
        torch.float32,
        AsyncLearner(**UNCLIPPED, lora=Lora(rank=4, alpha=8.0), loss=GrpoLoss(kl_beta=0.1)),
    ),
    "reference": ("llama", torch.float32, AsyncLearner(**UNCLIPPED, loss=GrpoLoss(kl_beta=0.1, normalisation="grpo"))),
    "checkpointing": ("llama", torch.float32, AsyncLearner(**UNCLIPPED, gradient_checkpointing=True)),
    "lora_checkpointing": (
        "llama",
        torch.float32,
        AsyncLearner(**UNCLIPPED, gradient_checkpointing=True, lora=Lora(rank=4, alpha=8.0)),
    ),
    "bf16": ("llama", torch.bfloat16, AsyncLearner(**UNCLIPPED)),
    "lora_bf16": ("llama", torch.bfloat16, AsyncLearner(**UNCLIPPED, lora=Lora(rank=4, alpha=8.0))),
}


def episodes_of(step: int) -> list[Any]:
    """Of very unequal lengths, so that an average of the ranks' averages would be another gradient."""
    return random_episodes(step, groups=5, size=3, max_prompt=12, max_response=15, max_turns=2)


def make(kind: type[Trainer], name: str, **more: Any) -> Trainer:
    """A case's trainer."""
    model, dtype, settings = CASES[name]
    torch.manual_seed(0)
    return kind(tiny_model(model, dtype=dtype), settings, **more)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(torch.device("cpu"))
    for name in CASES:
        place = folder / name
        trainer = make(LeadingTrainer if ranks.leads else Trainer, name, ranks=ranks)
        if not isinstance(trainer, LeadingTrainer):
            follow(trainer, ranks, place)
            continue
        metrics = []
        for step in range(2):
            metrics.append(trainer.step(episodes_of(step)))
            checkpoint.save(place, trainer.checkpoint(), keep=9)
        save_file({key: value.contiguous() for key, value in trainer.tensors().items()}, place / "tensors")
        trainer.restore(checkpoint.load(checkpoint.path_of(place, 1)))
        metrics.append(trainer.step(episodes_of(1)))
        checkpoint.save(place / "again", trainer.checkpoint(), keep=9)
        (place / "metrics.json").write_text(json.dumps(metrics))
        trainer.end()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
