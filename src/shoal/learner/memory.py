"""How much memory a run will take, part by part, before anything is loaded; and whether it fits.

P parameters of which P_t are trained, L layers, H hidden size, I width of the MLP, Q and K widths of queries and of
keys, V vocabulary, T tokens of a micro-batch, b bytes of a weight:

    weights       b P                       masters      4 P_t, where weights are not fp32
    gradients     4 P_t                     the fp32 sum over micro-batches
    optimizer     8 P_t, or 2.06 P_t        two moments of AdamW, fp32 or 8 bits with a scale a block of 128
    reference     b P                       with kl_beta > 0 and no adapters
    activations   b T L (6 H + 2 Q + 2 K + 4 I) + 8 T L H + b T V + 12 · 256 V        kept for the backward pass; with
                  gradient checkpointing b T L H for the layers' inputs, one layer's of the rest, and the head's chunks;
                  or b P_t, one pass's gradients, where those are more: the ones go as the others come
    snapshot      b P + b P / 4             the image that changes are made against, and the change in making
    runtime       what Python, torch and transformers take
    gathered      with N processes: two layers and the embeddings whole, 4 bytes a value of one of them on its way to be
                  summed; masters, gradients, optimizer, reference and the weights that are not trained are then 1/N

Of a worker: weights twice (in place and arriving), the key-value cache's budget, and the runtime.

1. The allocator's fragmentation is not known beforehand: `SLACK` is added for what is allocated anew each step.

Invariants: pure arithmetic, no torch; a machine's parts are added up where they share its memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import Config
from shoal.errors import CapacityError

GIB = 2**30

RUNTIME_BYTES = 700 * 2**20
"""Of a learner or worker process before it has loaded a model."""

SLACK = 0.05
"""Share of the activations added for freed and fragmented memory (`shoal bench memory_estimate`)."""

KNOWN: dict[str, dict[str, Any]] = {
    "embedded": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""Shapes of models that shipped configurations name, so that a dry run needs no download."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    hidden: int
    mlp: int
    layers: int
    queries: int
    keys: int
    vocab: int
    tied: bool
    head_dim: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        """From a `config.json` of `transformers`; raises `KeyError` where it says too little."""
        heads = int(config["num_attention_heads"])
        dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        return Shape(
            hidden=int(config["hidden_size"]),
            mlp=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            queries=heads * dim,
            keys=int(config.get("num_key_value_heads") or heads) * dim,
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            head_dim=dim,
        )

    def linear(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of one layer's matrices, by name."""
        h, i, q, k = self.hidden, self.mlp, self.queries, self.keys
        attention = {"q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q)}
        return attention | {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}

    @property
    def parameters(self) -> int:
        """P; norms included, biases not."""
        layer = sum(rows * columns for rows, columns in self.linear().values()) + 2 * self.hidden
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of low-rank adapters beside these matrices."""
        matrices = self.linear()
        return self.layers * sum(rank * sum(matrices[name]) for name in targets if name in matrices)


def shape_of(name: str) -> Shape | None:
    """The model's sizes, if they can be told without fetching anything."""
    if name in KNOWN:
        return Shape.of(KNOWN[name])
    file: Path | str | None = Path(name).expanduser() / "config.json"
    if not Path(name).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        file = found if isinstance(found, str) else None
    try:
        return None if file is None else Shape.of(json.loads(Path(file).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def learner_bytes(config: Config, shape: Shape) -> dict[str, int]:
    """What the learner's process takes at its peak, by part; of several, the first, which publishes as well."""
    learner, width = config.learner, {"bf16": 2, "fp32": 4}[config.model.dtype]
    total = shape.parameters
    lora = learner.lora
    trained = shape.adapters(lora.rank, lora.targets) if lora is not None else total
    moments = 8.0 if learner.optimizer == "adamw" else 2.0 + 2 * 4 / 128
    parts = {
        "weights": width * total,
        "masters": 4 * trained if width < 4 else 0,
        "gradients": 4 * trained,
        "optimizer": int(moments * trained),
        "reference": width * total if learner.loss.kl_beta > 0 and lora is None else 0,
        "activations": max(activation_bytes(config, shape), width * trained if width < 4 else 0),
        "snapshot": width * total * 5 // 4 + (width * total if lora is not None else 0),
        "runtime": RUNTIME_BYTES,
    }
    if learner.processes > 1:
        parts |= _divided(parts, shape, learner.processes, width=width, frozen=total - trained)
        parts["activations"] = activation_bytes(config, shape)
    parts["slack"] = int(SLACK * parts["activations"])
    return parts


def _divided(parts: Mapping[str, int], shape: Shape, processes: int, *, width: int, frozen: int) -> dict[str, int]:
    """What is divided among processes, and what each gathers of it to compute with."""
    layer = sum(rows * columns for rows, columns in shape.linear().values())
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    shared = {name: parts[name] // processes for name in ("masters", "gradients", "optimizer", "reference")}
    weights = width * frozen if width < 4 else parts["weights"]  # those that are trained are the masters
    gathered = width * (2 * layer + embeddings) + 4 * max(layer, embeddings)
    return shared | {"weights": weights // processes, "gathered": gathered}


def activation_bytes(config: Config, shape: Shape) -> int:
    """What one micro-batch keeps for its backward pass."""
    width = {"bf16": 2, "fp32": 4}[config.model.dtype]
    tokens, h = config.learner.microbatch_tokens, shape.hidden
    layer = width * tokens * (6 * h + 2 * shape.queries + 2 * shape.keys + 4 * shape.mlp) + 8 * tokens * h
    chunk = 12 * min(tokens, 256) * shape.vocab
    if config.learner.gradient_checkpointing:
        return width * tokens * shape.layers * h + layer + chunk
    return shape.layers * layer + width * tokens * shape.vocab + chunk


def worker_bytes(config: Config, shape: Shape) -> dict[str, int]:
    """What one of the run's own workers takes at its peak, by part."""
    width = {"bf16": 2, "fp32": 4}[config.model.dtype]
    cache = 2 * shape.layers * shape.keys * width * (config.workers.cache_tokens + config.workers.prefix_tokens)
    weights = width * shape.parameters
    return {"weights": weights, "arriving": 2 * weights, "cache": cache, "runtime": RUNTIME_BYTES}


def check_fits(needed: int, there: int, where: str) -> None:
    """Raise `CapacityError` where a run can't fit."""
    if needed > there:
        raise CapacityError(
            f"the run needs {needed / GIB:.1f} GiB of {where}, which has {there / GIB:.1f} GiB.",
            "Lower learner.microbatch_tokens or workers.cache_tokens, set learner.gradient_checkpointing, "
            "learner.lora or learner.optimizer = 'adamw8bit', or start fewer workers.",
        )
