"""What transformers says of tokens that somebody drew: teacher forcing in batches, in fp32.

A drawn token's *margin* is how much likelier, in logits, the likeliest one was: 0 where it is the one. Margins below
`NEAR_TIE` are what the order of sums may flip, in fp32 as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-3
BATCH_TOKENS = 2048
"""Padded tokens of one pass."""

Prompt = tuple[int, ...]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """Of each token of an answer."""

    margins: tuple[float, ...]
    logprobs: tuple[float, ...]
    """Untempered."""

    @property
    def worst(self) -> float:
        return max(self.margins, default=0.0)


class Reference:
    """transformers' model of a checkpoint; what it has judged it need not judge again."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        self._known: dict[tuple[Prompt, Ids], Judged] = {}

    def judge(self, answers: Sequence[tuple[Prompt, Ids]]) -> list[Judged]:
        """One entry for each answer; uses all cores."""
        fresh = sorted({a for a in answers if a not in self._known and a[1]}, key=lambda a: len(a[0]) + len(a[1]))
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            while fresh:
                longest = len(fresh[-1][0]) + len(fresh[-1][1])
                count = max(1, BATCH_TOKENS // longest)
                batch, fresh = fresh[-count:], fresh[:-count]
                self._judge(batch, longest)
                print(f"teacher forcing: {len(fresh)} answers left", file=sys.stderr, flush=True)
        finally:
            torch.set_num_threads(threads)
        return [self._known.get(answer, Judged((), ())) for answer in answers]

    @torch.inference_mode()
    def _judge(self, batch: Sequence[tuple[Prompt, Ids]], width: int) -> None:
        rows = [[*prompt, *ids, *[0] * (width - len(prompt) - len(ids))] for prompt, ids in batch]
        # Padding stands behind, where a causal model does not look.
        hidden: Tensor = self._model.model(torch.tensor(rows), use_cache=False).last_hidden_state
        for row, (prompt, ids) in enumerate(batch):
            logits = self._model.lm_head(hidden[row, len(prompt) - 1 : len(prompt) + len(ids) - 1])
            drawn = logits[torch.arange(len(ids)), list(ids)]
            margins, logprobs = logits.amax(-1) - drawn, drawn - logits.logsumexp(-1)
            self._known[prompt, ids] = Judged(tuple(margins.tolist()), tuple(logprobs.tolist()))
