"""EAGLE-3 heads on disk, in the layout of the public checkpoints: `config.json`, `model.safetensors`.

    fc.weight   midlayer.{self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj, hidden_norm, input_layernorm,
    post_attention_layernorm}.weight   norm.weight   lm_head.weight   d2t   t2d   [embed_tokens.weight]

Also read: the same with `layers.0.` for `midlayer.`, and with `model.` before names. A head without maps has the whole
vocabulary. Written: the first form, without the embedding, which is the target's.

Invariants: nothing is unpickled (`pytorch_model.bin` is refused); a tensor that is unknown, missing or of another shape
refuses the head, since it would draft nonsense in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.engine.source import WEIGHTS, LocalModel
from shoal.engine.speculation.eagle import NUM_DEPTHS, EagleHead, feature_depths
from shoal.errors import ModelError

ARCHITECTURE = "LlamaForCausalLMEagle3"
EMBEDDING = "embed_tokens.weight"

LAYER = {
    "q_proj.weight": "self_attn.q_proj.weight",
    "k_proj.weight": "self_attn.k_proj.weight",
    "v_proj.weight": "self_attn.v_proj.weight",
    "o_proj.weight": "self_attn.o_proj.weight",
    "gate_proj.weight": "mlp.gate_proj.weight",
    "up_proj.weight": "mlp.up_proj.weight",
    "down_proj.weight": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "hidden_norm": "hidden_norm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
}
"""Ours -> theirs, inside the layer."""

NAMES = {ours: f"midlayer.{theirs}" for ours, theirs in LAYER.items()} | {
    "fc.weight": "fc.weight",
    "norm": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "d2t": "d2t",
    "t2d": "t2d",
}


@dataclass(frozen=True)
class LoadedHead:
    """A head, ready to draft for its target."""

    head: EagleHead
    embedding_VH: Tensor
    depths: tuple[int, ...]
    """Layers of the target whose incoming hidden states it reads."""


def is_head(config: Any) -> bool:
    """Whether a checkpoint's configuration is that of a head, not of a whole model."""
    return ARCHITECTURE in (config.architectures or ()) or bool(getattr(config, "draft_vocab_size", None))


def head_config(target: Any, draft_vocab_size: int) -> dict[str, Any]:
    """A new head's configuration for a target's: its sizes, one layer."""
    rope = getattr(target, "rope_parameters", None) or {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)},
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def new_head(config: Mapping[str, Any], target_hidden_size: int) -> EagleHead:
    """A head with random weights."""
    from transformers import LlamaConfig

    return EagleHead(LlamaConfig(**config), NUM_DEPTHS * target_hidden_size)


def save_head(head: EagleHead, config: Mapping[str, Any], directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head into an existing directory."""
    tensors = {
        NAMES[name]: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in head.state_dict().items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n")


def load_head(directory: Path, target: LocalModel, dtype: torch.dtype, device: torch.device) -> LoadedHead:
    """A head from a folder, checked against its target.

    Raises:
        ModelError: it is incomplete, damaged, pickled, or of another target.
    """
    if not any(directory.glob("*.safetensors")) and any(directory.glob("*.bin")):
        raise ModelError(
            f"{directory} holds a pickled checkpoint, which could run code.", "Convert it to safetensors first."
        )
    model = LocalModel(directory.name, directory)
    config, wanted = model.config(), target.config()
    if config.vocab_size != wanted.vocab_size:
        raise ModelError(
            f"the head is for {config.vocab_size} tokens, the target has {wanted.vocab_size}.",
            "Take a head that was trained for this model.",
        )
    if not getattr(config, "draft_vocab_size", None):
        config.draft_vocab_size = config.vocab_size
    found = {_canonical(name): tensor for name, tensor in model.tensors().items()}
    embedding = found.pop(EMBEDDING, None)
    if embedding is None:
        embedding = target.tensors()["model.embed_tokens.weight"]
    own = getattr(config, "target_hidden_size", None) or wanted.hidden_size
    if own != wanted.hidden_size:
        raise ModelError(
            f"the head reads hidden states of {own} numbers, the target has {wanted.hidden_size}.",
            "Take a head that was trained for this model.",
        )
    head = EagleHead(config, NUM_DEPTHS * own)
    if config.draft_vocab_size == config.vocab_size and "d2t" not in found:
        found |= {"d2t": torch.zeros_like(head.d2t), "t2d": torch.ones_like(head.t2d)}
    if tuple(embedding.shape) != (config.vocab_size, config.hidden_size):
        raise ModelError(f"the head's embedding has shape {tuple(embedding.shape)}.", "It is of another model.")
    _load(head, found)
    depths = tuple(_recorded_depths(config) or feature_depths(wanted.num_hidden_layers))
    if len(depths) != NUM_DEPTHS or not all(0 <= depth < wanted.num_hidden_layers for depth in depths):
        raise ModelError(f"the head reads layers {depths}, which the target does not have.", "It is of another model.")
    return LoadedHead(head.to(device, dtype).eval().requires_grad_(False), embedding.to(device, dtype), depths)


def _load(head: EagleHead, found: Mapping[str, Tensor]) -> None:
    state = head.state_dict()
    odd = set(found) ^ {NAMES[name] for name in state}
    if odd:
        raise ModelError(f"the head's tensor '{min(odd)}' is missing or unknown.", "It is not in EAGLE-3's layout.")
    for name, own in state.items():
        tensor = found[NAMES[name]]
        if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
            raise ModelError(
                f"the head's tensor '{NAMES[name]}' has shape {tuple(tensor.shape)}, not {tuple(own.shape)}.",
                "It is of another model.",
            )
    head.load_state_dict({name: found[NAMES[name]] for name in state})
    ids_R = head.ids_R
    if not bool(((ids_R >= 0) & (ids_R < head.vocab_size)).all()):
        raise ModelError("the head's map d2t leaves the target's vocabulary.", "It is damaged, or of another model.")


def _canonical(name: str) -> str:
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


def _recorded_depths(config: Any) -> tuple[int, ...] | None:
    own = getattr(config, "eagle_config", None) or {}
    layers = own.get("eagle_aux_hidden_state_layer_ids") if isinstance(own, dict) else None
    return tuple(int(layer) for layer in layers) if layers else None
