"""EAGLE-3's draft head (arXiv 2503.01840): one decoder layer that reads what the target thought at three depths.

At position t it takes the target's hidden states entering a low, a middle and a high layer, fused to one (`fc`), beside
the embedding of the token that follows, x_{t+1}; its output says x_{t+2}. A draft's next step has no features of the
target: it takes the head's own output in their place. Output logits are over a reduced vocabulary, whose maps `d2t` and
`t2d` are part of the head, as in the public checkpoints.

    g = fc(features)  or the head's own last output
    h = g + attention([norm_e(embedding) ; norm_h(g)])        h = h + mlp(norm_p(h))        logits = lm_head(norm(h))

Used by `eagle_drafter` for decoding and `eagle_training` for learning: both run `EagleHead.step`, with an attention of
their own.

Shapes: B rows, T positions, H hidden size, F = 3·(target's hidden size), D head size, N query and K key-value heads,
V the target's vocabulary, R the reduced one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.engine.rotary import Rotary, rotate

NUM_DEPTHS = 3
LOW, FROM_TOP = 2, 3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, T, N, D], keys and values [B, T, K, D] of the new positions -> mixed values [B, T, N·D]."""


def feature_depths(num_layers: int) -> tuple[int, int, int]:
    """The layers whose incoming hidden states are read: 2, the middle, the third from the top, as EAGLE-3 trains it;
    for models too shallow for that, whatever comes nearest behind the first layer."""
    last = num_layers - 1
    return min(LOW, last), min(max(num_layers // 2, 1), last), min(max(num_layers - FROM_TOP, 1), last)


class EagleHead(nn.Module):
    """The head's weights and one step of it.

    Args:
        config: its `transformers` configuration: a Llama's of one layer, with `draft_vocab_size`.
        features_size: F.
    """

    d2t: Tensor
    """Target's id minus reduced id, [R], as the public checkpoints have it."""
    t2d: Tensor
    """Whether the reduced vocabulary has a token, [V]."""

    def __init__(self, config: Any, features_size: int) -> None:
        super().__init__()
        hidden, self.eps = config.hidden_size, config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim = getattr(config, "head_dim", None) or hidden // self.num_heads
        self.vocab_size, self.draft_vocab_size = config.vocab_size, config.draft_vocab_size
        self.hidden_size, self.features_size = hidden, features_size
        q, kv, inner = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.intermediate_size

        def linear(columns: int, rows: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False)

        self.fc = linear(features_size, hidden)
        self.q_proj, self.k_proj, self.v_proj = linear(2 * hidden, q), linear(2 * hidden, kv), linear(2 * hidden, kv)
        self.o_proj = linear(q, hidden)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm, self.norm = (
            nn.Parameter(torch.ones(hidden)) for _ in range(4)
        )
        self.lm_head = linear(hidden, self.draft_vocab_size)
        self.register_buffer("d2t", torch.zeros(self.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(self.vocab_size, dtype=torch.bool))
        self._config = config
        self._rotary: tuple[torch.device, Rotary] | None = None

    def set_vocabulary(self, ids_R: Tensor) -> None:
        """The reduced vocabulary: the target's ids, ascending."""
        assert ids_R.shape == (self.draft_vocab_size,) and bool((ids_R.diff() > 0).all())
        self.d2t.copy_(ids_R - torch.arange(self.draft_vocab_size))
        self.t2d.zero_()
        self.t2d[ids_R] = True

    @property
    def ids_R(self) -> Tensor:
        """The target's id of each reduced one."""
        return self.d2t + torch.arange(self.draft_vocab_size, device=self.d2t.device)

    def step(self, g_BTH: Tensor, embeddings_BTH: Tensor, positions_BT: Tensor, attention: Attention) -> Tensor:
        """The head's output, [B, T, H]: the next step's `g`, and what `logits` reads."""
        batch, width = g_BTH.shape[:2]
        if self._rotary is None or self._rotary[0] != g_BTH.device:
            self._rotary = g_BTH.device, Rotary(self._config, self.head_dim, g_BTH.device)
        cos, sin = self._rotary[1].angles(positions_BT, g_BTH.dtype)
        x = torch.cat((self._norm(embeddings_BTH, self.input_layernorm), self._norm(g_BTH, self.hidden_norm)), dim=-1)
        q = rotate(self.q_proj(x).view(batch, width, self.num_heads, self.head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(batch, width, self.num_kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(x).view(batch, width, self.num_kv_heads, self.head_dim)
        h = g_BTH + self.o_proj(attention(q, k, v))
        normed = self._norm(h, self.post_attention_layernorm)
        return h + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))

    def logits(self, output: Tensor) -> Tensor:
        """Over the reduced vocabulary, [..., R]."""
        return self.lm_head(self._norm(output, self.norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden_size,), weight, self.eps)
