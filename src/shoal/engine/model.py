"""The forward pass of Llama- and Qwen-type decoders over a key-value cache: ids and cache in, hidden states out.

One function serves prefill (many tokens a row), decode (one) and verification of drafts (a few), for a whole model and
for a pipeline stage's layers. Logits equal those of `transformers` (tested to 1e-4 in fp32). Fused projections: q, k
and v are one matrix, gate and up another.

Invariants: a row's token at position p attends to cached positions 0…p of its own row only; whatever lies behind p
in the cache (padding, a rejected draft) weighs nothing and is overwritten when p is reached. All names, shapes and
types are checked before the first weight is replaced, so a model is never half old and half new.

Shapes: B rows, T new tokens a row, L cached positions, H hidden size, V vocabulary, D head size, N query heads, K
key-value heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.decoding import FEW, decode, has_kernels
from shoal.engine.features import Features, Passed
from shoal.engine.linear import Linear, can_pack
from shoal.engine.lora import Adapter, grouped
from shoal.engine.quantised import QuantisedLinear
from shoal.engine.rotary import Rotary, rotate
from shoal.engine.speculation.drafts import ancestors
from shoal.errors import ModelError

SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` values whose layers this forward pass computes exactly."""

FEW_SCORES = 1 << 21
"""Up to this many attention scores, plain products of small matrices beat the fused kernel: 1.5 against 4.2 ms a
layer for 32 prompts of 38 tokens, in bf16 on one CPU core; from 4 × 512 tokens on the fused kernel wins."""


@dataclass(frozen=True)
class Architecture:
    """The numbers of one decoder, read from its Hugging Face configuration."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Qwen3 normalises each query and key head before rotating it."""

    @staticmethod
    def from_config(config: Any) -> Architecture:
        """Read a `transformers` configuration; raises `ModelError` for a type that would be computed wrongly."""
        kind = config.model_type
        if kind not in SUPPORTED_TYPES:
            raise ModelError(
                f"model type '{kind}' is not supported by the engine.", f"Supported: {', '.join(SUPPORTED_TYPES)}."
            )
        if config.hidden_act != "silu":
            raise ModelError(f"activation '{config.hidden_act}' is not supported.", "Llama and Qwen models use silu.")
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", kind == "mistral"):
            raise ModelError("sliding-window attention is not supported.", "Use a checkpoint with full attention.")
        if getattr(config, "quantization_config", None):
            raise ModelError(
                "the checkpoint is quantised, and its scales would be ignored.",
                "Use the model's unquantised checkpoint, or a GGUF file.",
            )
        num_heads = config.num_attention_heads
        return Architecture(
            model_type=kind,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            vocab_size=config.vocab_size,
            context_tokens=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            tie_embeddings=bool(config.tie_word_embeddings),
            attention_bias=kind == "qwen2" or bool(getattr(config, "attention_bias", False)),
            output_bias=kind != "qwen2" and bool(getattr(config, "attention_bias", False)),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )


@dataclass(frozen=True)
class Part:
    """Which of a model's weights a decoder holds: stages of a pipeline share them out, its requester has the head."""

    first: int = 0
    last: int | None = None
    """Layers `first` … `last` - 1; absent: all from `first` on."""
    embeds: bool = True
    norms: bool = True
    heads: bool = True

    @staticmethod
    def stage(first: int, last: int, num_layers: int) -> Part:
        """Layers, with the embedding before the first and the final norm behind the last of them."""
        return Part(first, last, embeds=first == 0, norms=last == num_layers, heads=False)


WHOLE = Part()
HEAD = Part(last=0, embeds=False, norms=False)
"""Makes logits of hidden states that others have computed."""


class _Layer:
    """One decoder layer's weights."""

    def __init__(
        self, arch: Architecture, dtype: torch.dtype, device: torch.device, make: type[Linear] = Linear
    ) -> None:
        q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        hidden, inner = arch.hidden_size, arch.intermediate_size

        def linear(parts: dict[str, int], columns: int, bias: bool) -> Linear:
            return make(parts, columns, bias=bias, dtype=dtype, device=device)

        attention = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        self.qkv = linear(attention, hidden, arch.attention_bias)
        self.out = linear({"self_attn.o_proj": hidden}, q, arch.output_bias)
        self.gate_up = linear({"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, arch.mlp_bias)
        self.down = linear({"mlp.down_proj": hidden}, inner, arch.mlp_bias)
        self.linears = {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}
        self.norm1 = torch.empty(hidden, dtype=dtype, device=device)
        self.norm2 = torch.empty_like(self.norm1)
        self._norms = {"input_layernorm.weight": self.norm1, "post_attention_layernorm.weight": self.norm2}
        self.q_norm = self.k_norm = None
        if arch.qk_norm:
            self.q_norm = torch.empty(arch.head_dim, dtype=dtype, device=device)
            self.k_norm = torch.empty_like(self.q_norm)
            self._norms |= {"self_attn.q_norm.weight": self.q_norm, "self_attn.k_norm.weight": self.k_norm}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors, without the layer's prefix."""
        found = {name: tuple(norm.shape) for name, norm in self._norms.items()}
        for linear in self.linears.values():
            found |= linear.shapes()
        return found

    def load(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        for name, norm in self._norms.items():
            norm.copy_(tensors[prefix + name])
        for linear in self.linears.values():
            linear.load(tensors, prefix)


class Decoder:
    """A decoder's weights and its forward pass.

    Args:
        config: the checkpoint's `transformers` configuration.
        dtype: of weights, activations and cache; norms and softmax run in fp32 inside.
        device: where it all lives.
        part: which weights it holds; its cache then has its layers only.
        int8: keep the matrices of layers and head in 8 bits (`quantised`).
    """

    def __init__(
        self, config: Any, dtype: torch.dtype, device: torch.device, part: Part = WHOLE, *, int8: bool = False
    ) -> None:
        self.arch = Architecture.from_config(config)
        self.dtype = dtype
        self.device = device
        self.part = part
        arch = self.arch
        self._head: Linear | None = None  # None: the embedding itself, where there is a head
        make = QuantisedLinear if int8 else Linear
        if part.heads and (not arch.tie_embeddings or int8 or can_pack(dtype, device)):
            name = "model.embed_tokens" if arch.tie_embeddings else "lm_head"
            self._head = make({name: arch.vocab_size}, arch.hidden_size, bias=False, dtype=dtype, device=device)
        self._embedding: Tensor | None = None
        if part.embeds or (part.heads and self._head is None):
            self._embedding = torch.empty(arch.vocab_size, arch.hidden_size, dtype=dtype, device=device)
        self._norm = torch.empty(arch.hidden_size, dtype=dtype, device=device) if part.norms else None
        self._numbers = range(arch.num_layers)[part.first : part.last]
        self._layers = [_Layer(arch, dtype, device, make) for _ in self._numbers]
        self._decodes = has_kernels(dtype, device)
        self._rotary = Rotary(config, arch.head_dim, device)
        self._shapes = self._all_shapes()

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        if self._embedding is not None:
            found["model.embed_tokens.weight"] = tuple(self._embedding.shape)
        if self._norm is not None:
            found["model.norm.weight"] = tuple(self._norm.shape)
        if self._head is not None:
            found |= self._head.shapes()
        for number, layer in zip(self._numbers, self._layers, strict=True):
            found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.shapes().items()}
        return found

    @property
    def tensor_names(self) -> list[str]:
        """The checkpoint names this model needs, all of them, tied ones once."""
        return list(self._shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The same names with the shapes that their tensors have to have."""
        return self._shapes

    @torch.inference_mode()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every weight; nothing changes if a tensor is missing or not what it should be.

        Raises:
            ModelError: a name is missing, a shape differs, or a tensor holds no floating-point numbers.
        """
        for name, shape in self._shapes.items():
            if name not in tensors:
                raise ModelError(f"the checkpoint lacks tensor '{name}'.", "It is incomplete or of another model.")
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"tensor '{name}' has shape {tuple(tensor.shape)}, not {shape}.",
                    "The checkpoint is of another model.",
                )
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise ModelError(
                    f"tensor '{name}' holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point weights.",
                    "Use the model's unquantised checkpoint, or a GGUF file.",
                )
        if self._embedding is not None:
            self._embedding.copy_(tensors["model.embed_tokens.weight"])
        if self._norm is not None:
            self._norm.copy_(tensors["model.norm.weight"])
        if self._head is not None:
            self._head.load(tensors)
        for number, layer in zip(self._numbers, self._layers, strict=True):
            layer.load(tensors, f"model.layers.{number}.")

    def adapter(self, name: str, directory: Path) -> Adapter:
        """Load an adapter of this model; raises `ModelError` where it is none."""
        return Adapter(name, directory, [layer.linears for layer in self._layers], self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self,
        x_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        first_slot: int = 0,
        at_B: Tensor | None = None,
        adapters: Sequence[Adapter | None] = (),
        tree_BTT: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]; keys and values are written to the cache.

        Args:
            x_BT: new token ids, int64; rows shorter than T are padded at the end with any id. For a part that does not
                embed: hidden states [B, T, H] after the layer before its first.
            start_B: position of each row's first new token, int64: how many tokens its slot already holds.
            cache: rows `first_slot … first_slot + B` are used; its capacity covers start + T.
            at_B: which of a row's new tokens is asked about, int64; the result is then [B, 1, H].
            adapters: one entry a row, or nothing where no row has one.
            tree_BTT: where the new tokens are a tree, which of them each sees, itself included; absent: all before it.
            observe: told the hidden states [B, T, H] that enter each layer.
        """
        arch = self.arch
        batch, width = x_BT.shape[:2]
        heads, kv_heads, dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        slots_BT = start_B[:, None] + torch.arange(width, device=self.device)
        positions_BT = slots_BT if tree_BTT is None else start_B[:, None] + tree_BTT.sum(dim=-1) - 1
        cos, sin = self._rotary.angles(positions_BT, self.dtype)
        groups = grouped(adapters, self.device)

        def project(index: int, name: str, x: Tensor) -> Tensor:
            y = self._layers[index].linears[name](x)
            for adapter, rows in groups:
                adapter.add(index, name, x, y, rows)
            return y

        hidden = x_BT
        if self.part.embeds:
            assert self._embedding is not None
            hidden = F.embedding(x_BT, self._embedding)
        if self._decodes and width <= FEW and tree_BTT is None:
            hidden = decode(arch, self._layers, project, hidden, start_B, (cos, sin), cache, first_slot, observe)
            return self._normed(hidden, at_B)
        # What nobody has reached is not read: decoding waits for memory. On a GPU, asking would take longer.
        reach = cache.capacity if self.device.type == "cuda" else int(start_B.max()) + width
        seen_B1TL = torch.arange(reach, device=self.device) <= slots_BT[:, None, :, None]
        if tree_BTT is not None:
            seen_B1TL.scatter_(3, slots_BT[:, None, None].expand(-1, 1, width, -1), tree_BTT[:, None])
        bias_B1TL = torch.zeros(seen_B1TL.shape, dtype=self.dtype, device=self.device)
        bias_B1TL.masked_fill_(~seen_B1TL, float("-inf"))
        for index, layer in enumerate(self._layers):
            if observe is not None:
                observe(index, hidden)
            normed = F.rms_norm(hidden, (arch.hidden_size,), layer.norm1, arch.norm_eps)
            qkv = project(index, "qkv", normed).view(batch, width, heads + 2 * kv_heads, dim)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rotate(F.rms_norm(q, (dim,), layer.q_norm, arch.norm_eps), cos, sin)
                k = rotate(F.rms_norm(k, (dim,), layer.k_norm, arch.norm_eps), cos, sin)
            else:
                q, k = rotate(qkv[:, :, : heads + kv_heads], cos, sin).split((heads, kv_heads), dim=2)
            keys, values = cache.write(index, first_slot, slots_BT, k, v, reach)
            hidden = hidden + project(index, "out", attend(q, keys, values, bias_B1TL))
            normed = F.rms_norm(hidden, (arch.hidden_size,), layer.norm2, arch.norm_eps)
            gate, up = project(index, "gate_up", normed).chunk(2, dim=-1)
            hidden = hidden + project(index, "down", F.silu(gate).mul_(up))
        return self._normed(hidden, at_B)

    def _normed(self, hidden: Tensor, at_B: Tensor | None) -> Tensor:
        """What `forward` gives, of hidden states behind the layers."""
        size = self.arch.hidden_size
        if at_B is not None:
            hidden = hidden.gather(1, at_B[:, None, None].expand(-1, 1, size))
        return hidden if self._norm is None else F.rms_norm(hidden, (size,), self._norm, self.arch.norm_eps)

    def launch(
        self,
        x_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        *,
        adapters: Sequence[Adapter | None] = (),
        parents_BN: Tensor | None = None,
        depths: tuple[int, ...] = (),
    ) -> tuple[Callable[[], Passed | None], Callable[[], None]]:
        """A pass over all live rows' newest tokens and drafts, which need not be over when this returns.

        Args:
            parents_BN: where the drafts are trees (`Drafts`).
            depths: layers whose incoming hidden states are wanted.

        Returns:
            What waits for it (nothing comes if it was lost on its way), and what says that nobody will.
        """
        observed = Features(depths)
        started = time.perf_counter()
        tree = None if parents_BN is None else ancestors(parents_BN).to(self.device)
        observe = observed if depths else None
        hidden = self.forward(x_BT, start_B, cache, adapters=adapters, tree_BTT=tree, observe=observe)
        passed = Passed(hidden, observed.rows(), time.perf_counter() - started)
        return (lambda: passed), (lambda: None)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, [..., V], of hidden states [..., H], in the model's own type."""
        if self._head is not None:
            return self._head(hidden)
        assert self._embedding is not None
        return F.linear(hidden, self._embedding)


def weight_bytes(config: Any, item_bytes: int, *, int8: bool = False) -> int:
    """Memory that a whole model's weights take, with `item_bytes` a number."""
    decoder = Decoder(config, torch.float32, torch.device("meta"), int8=int8)
    embedding = decoder.arch.vocab_size * decoder.arch.hidden_size
    total = sum(torch.Size(shape).numel() for shape in decoder.shapes.values())
    if not int8:
        # Where the head is the embedding, packed, it exists twice.
        return (total + embedding * decoder.arch.tie_embeddings) * item_bytes
    return embedding * item_bytes + total


def attend(q: Tensor, keys: Tensor, values: Tensor, bias_B1TL: Tensor) -> Tensor:
    """Grouped-query attention: q [B, T, N, D] over keys and values [B, K, L, D]; gives [B, T, N·D]."""
    batch, width, heads, dim = q.shape
    kv_heads, reach = keys.shape[1:3]
    group = heads // kv_heads
    if width > 1 and batch * heads * width * reach > FEW_SCORES:
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=bias_B1TL, enable_gqa=group > 1
        )
        return mixed.transpose(1, 2).reshape(batch, width, heads * dim)
    # The query heads that share a key head become rows of one small product: keys are read once and never copied.
    rows = q.view(batch, width, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(-1, group * width, dim)
    scores = torch.bmm(rows, keys.reshape(-1, reach, dim).transpose(1, 2)).float().mul_(dim**-0.5)
    scores = scores.view(batch, heads, width, reach).add_(bias_B1TL)
    weights = scores.softmax(dim=-1).to(values.dtype).view(-1, group * width, reach)
    mixed = torch.bmm(weights, values.reshape(-1, reach, dim)).view(batch, kv_heads, group, width, dim)
    return mixed.permute(0, 3, 1, 2, 4).reshape(batch, width, heads * dim)
