"""A head at the beginning of its training, and everything it learns with: made the same for the same seed and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.engine.local import pick_device
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.speculation.eagle import EagleHead, feature_depths
from shoal.engine.speculation.eagle_files import head_config, new_head, save_head
from shoal.engine.speculation.eagle_training import (
    Optimizer,
    Plan,
    StepReport,
    Teacher,
    evaluate,
    frequent_ids,
    train,
)
from shoal.engine.speculation.writing import TargetText


@dataclass(frozen=True)
class Pupil:
    """A head and its teacher."""

    head: EagleHead
    settings: dict[str, Any]
    embedding_VH: Tensor
    teacher: Teacher

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns."""
        return dict(self.head.named_parameters())

    def train(
        self, texts: Sequence[TargetText], plan: Plan, optimizer: Optimizer, begin: int = 0
    ) -> Iterator[StepReport]:
        """As `eagle_training.train`."""
        return train(self.head, self.embedding_VH, self.teacher, texts, plan, optimizer, begin)

    def evaluate(self, texts: Sequence[TargetText], plan: Plan) -> tuple[float, list[float]]:
        """As `eagle_training.evaluate`."""
        return evaluate(self.head, self.embedding_VH, self.teacher, texts, plan)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return dict(self.head.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; raises `RuntimeError` where it is of another head."""
        self.head.load_state_dict(dict(state))

    def save(self, directory: Path) -> None:
        """Write the head as it is now, making the folder."""
        directory.mkdir(exist_ok=True)
        save_head(self.head, self.settings, directory)


def prepare(
    local: LocalModel,
    texts: Sequence[TargetText],
    draft_vocab: int,
    *,
    dtype: str,
    device: str,
    threads: int,
    seed: int,
) -> Pupil:
    """A new head for a model, with the reduced vocabulary that the texts use most.

    Args:
        dtype: bf16 or fp32, of head and model.
        device: auto, cpu, cuda or cuda:N.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where, config = pick_device(device), local.config()
    target = Decoder(config, torch.bfloat16 if dtype == "bf16" else torch.float32, where)
    tensors = local.tensors()
    target.load(tensors)
    size = min(draft_vocab, config.vocab_size)
    settings = head_config(config, size)
    head = new_head(settings, config.hidden_size)
    ids_R = frequent_ids(texts, size, config.vocab_size)
    head.set_vocabulary(ids_R)
    embedding_VH = tensors["model.embed_tokens.weight"]
    with torch.no_grad():
        # The target's own rows for these tokens are a better beginning than chance.
        head.lm_head.weight.copy_(tensors.get("lm_head.weight", embedding_VH)[ids_R].float())
    head.to(where, target.dtype)
    teacher = Teacher(target, feature_depths(config.num_hidden_layers), ids_R)
    return Pupil(head, settings, embedding_VH.to(where), teacher)
