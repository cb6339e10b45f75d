"""Log-probabilities of the tokens that were drawn, from the model being trained.

The decoder runs over a packed row once; the LM head runs only where a trained token is predicted, which for short
answers to long prompts is most of the saving. The temperature is the one the tokens were sampled at, so with
unchanged weights every ratio is 1 up to the two forward passes' rounding.

Invariant: what is returned belongs to the micro-batch's targets, in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.learner.attention import layout, use_packed_attention
from shoal.learner.head import chosen_logprobs
from shoal.learner.packing import MicroBatch

SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` values whose decoder and head are computed exactly here: the engine's."""


def prepare(model: PreTrainedModel) -> None:
    """Check that `model` can be trained here and make it attend over packed rows.

    Raises:
        ModelError: its type, attention or head is not one that this room computes exactly.
    """
    config = model.config
    if config.model_type not in SUPPORTED_TYPES:
        raise ModelError(
            f"model type '{config.model_type}' cannot be trained.", f"Supported: {', '.join(SUPPORTED_TYPES)}."
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", config.model_type == "mistral"):
        raise ModelError("sliding-window attention cannot be trained.", "Use a checkpoint with full attention.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise ModelError("the model's head is not a plain matrix, so it cannot be trained.")
    use_packed_attention(model)


def response_logprobs(
    model: PreTrainedModel,
    batch: MicroBatch,
    *,
    allowed: NDArray[np.uint8] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π (with gradient where the model has any) and entropy of each target, [N] each, fp32, in nats.

    Args:
        model: prepared by `prepare`.
        allowed: which tokens could be drawn for each target, packed as `head` takes them; None is all of them.
        recompute: trade the head's memory for time, as gradient checkpointing does for the layers.
    """
    weight = model.get_output_embeddings().weight
    device = weight.device
    config = model.config
    heads_per_key = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    extra: dict[str, Any] = {"spans": layout(batch.spans, heads_per_key, device)}
    hidden = model.base_model(
        input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
        position_ids=torch.from_numpy(batch.position_ids)[None].to(device),
        # Spans say who sees whom. A mask of four dimensions is taken as it is, so this one keeps the library from
        # building its own of T x T; nobody reads it.
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),
        use_cache=False,
        **extra,
    ).last_hidden_state[0]
    temperatures = None
    if (batch.temperatures != 1.0).any():
        temperatures = torch.from_numpy(batch.temperatures).float().to(device)
    return chosen_logprobs(
        hidden.index_select(0, torch.from_numpy(batch.predict_at).to(device)),
        weight,
        torch.from_numpy(batch.targets).to(device),
        temperatures,
        allowed=None if allowed is None else torch.from_numpy(allowed).to(device),
        recompute=recompute,
    )


class Policy(nn.Module):
    """The forward pass as a module of its own, so that parameters in parts are gathered around it (`sharding`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: MicroBatch, allowed: NDArray[np.uint8] | None, recompute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`response_logprobs` of the model."""
        return response_logprobs(self.model, batch, allowed=allowed, recompute=recompute)
