"""Texts to vectors: an encoder or a decoder whose last hidden states are pooled into one vector of length 1 a text.

What waits is computed together, whoever asked for it, as much at once as `BATCH_TOKENS` allows; one thread does it.

How a checkpoint pools is said by its `1_Pooling/config.json` (the format of sentence-transformers): the mean over a
text's tokens, the first token (BERT's [CLS]), or the last. Without that file, models that see both ways take the mean
and causal ones the last token, to which everything before has flowed.

Invariants: a text's vector does not depend on what is computed beside it, up to the order of sums; at most `MAX_INPUTS`
texts wait; one whose caller has gone is not computed.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from shoal.engine.source import LocalModel
from shoal.errors import CapacityError, ModelError

BATCH_TOKENS = 4096
"""Padded tokens of one pass."""

MAX_INPUTS = 8192
POOLING = Path("1_Pooling") / "config.json"
Pooling = Literal["mean", "first", "last"]
POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")
"""`model_type` values whose tokens see only what stands before them."""

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What `transformers` raises for a folder that holds no model of a kind it knows."""


@dataclass(eq=False)
class _Text:
    """One text that waits."""

    ids: tuple[int, ...]
    done: asyncio.Future[list[float]]


class Embedder:
    """One embedding model.

    Args:
        model: the folder; its tokenizer adds the model's own start and end tokens.

    Raises:
        ModelError: it holds no model that can be used, or asks for another pooling.
    """

    def __init__(self, model: LocalModel, *, dtype: str = "fp32", device: str = "cpu", threads: int = 1) -> None:
        from transformers import AutoModel, AutoTokenizer

        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = model.config()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model.directory), **place)
            self._model: Any = AutoModel.from_pretrained(str(model.directory), dtype=kind, **place).to(device).eval()
        except DAMAGED as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(f"no embedding model can be loaded from {model.directory}: {reason}.") from None
        self._device = torch.device(device)
        self.pooling = _pooling(model.directory, config.model_type)
        self.size = int(config.hidden_size)
        """Numbers of a vector."""
        # Encoders of RoBERTa's kind count positions from behind their padding token's.
        offset = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        self.context_tokens = int(getattr(config, "max_position_embeddings", 512)) - offset
        self._thread = ThreadPoolExecutor(1, "shoal-embed", torch.set_num_threads, (threads,))
        self._waiting: deque[_Text] = deque()
        self._working: asyncio.Task[None] | None = None
        self.num_tokens = 0
        """Computed since the start."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; a control token's name in it is text."""
        return tuple(self._tokenizer.encode(text, split_special_tokens=True))

    def check(self, inputs: Sequence[tuple[int, ...]]) -> None:
        """Raise `CapacityError` for what can never be computed."""
        for ids in inputs:
            if not 1 <= len(ids) <= self.context_tokens:
                raise CapacityError(
                    f"a text of {len(ids)} tokens is not between 1 and the model's {self.context_tokens}.",
                    "Cut it into pieces.",
                )
            if min(ids) < 0 or max(ids) >= self._model.config.vocab_size:
                raise CapacityError("a token id is outside the model's vocabulary.")
        if len(inputs) > MAX_INPUTS:
            raise CapacityError(f"{len(inputs)} texts are more than the {MAX_INPUTS} that are taken at once.")

    async def embed(self, inputs: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """One vector of length 1 for each text.

        Raises:
            CapacityError: one can never be computed, or too many wait already.
        """
        self.check(inputs)
        if len(self._waiting) + len(inputs) > MAX_INPUTS:
            raise CapacityError(f"{len(self._waiting)} texts wait already.", "Ask again later.")
        loop = asyncio.get_running_loop()
        texts = [_Text(ids, loop.create_future()) for ids in inputs]
        self._waiting += texts
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        try:
            return await asyncio.gather(*(text.done for text in texts))
        finally:
            for text in texts:
                text.done.cancel()

    async def close(self) -> None:
        """End; whoever waits is told."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        for text in self._waiting:
            if not text.done.done():
                text.done.set_exception(ModelError("the embedding model is closed."))
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Compute until nobody waits."""
        loop = asyncio.get_running_loop()
        while batch := self._next():
            try:
                vectors = await loop.run_in_executor(self._thread, self._compute, [text.ids for text in batch])
            except asyncio.CancelledError:
                self._waiting.extendleft(reversed(batch))  # for `close` to tell them
                raise
            except RuntimeError as error:  # torch tells of too little memory so
                for text in batch:
                    if not text.done.done():
                        text.done.set_exception(ModelError(f"a text could not be computed: {error}."))
                continue
            for text, vector in zip(batch, vectors, strict=True):
                if not text.done.done():
                    text.done.set_result(vector)

    def _next(self) -> list[_Text]:
        """The next texts, in order, that fit one pass."""
        batch: list[_Text] = []
        longest = 0
        while self._waiting:
            text = self._waiting[0]
            if text.done.done():
                self._waiting.popleft()
                continue
            longest = max(longest, len(text.ids))
            if batch and (len(batch) + 1) * longest > BATCH_TOKENS:
                break
            batch.append(self._waiting.popleft())
        return batch

    @torch.inference_mode()
    def _compute(self, inputs: Sequence[tuple[int, ...]]) -> list[list[float]]:
        width = max(map(len, inputs))
        padding = self._tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[*ids, *[padding] * (width - len(ids))] for ids in inputs], device=self._device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs], device=self._device)
        hidden_BTH = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        self.num_tokens += int(mask_BT.sum())
        vectors: list[list[float]] = F.normalize(pool(hidden_BTH, mask_BT, self.pooling), dim=-1).tolist()
        return vectors


def pool(hidden_BTH: Tensor, mask_BT: Tensor, how: Pooling) -> Tensor:
    """One vector a row; padding stands at the end."""
    if how == "first":
        return hidden_BTH[:, 0]
    if how == "last":
        return hidden_BTH[torch.arange(len(mask_BT), device=mask_BT.device), mask_BT.sum(-1) - 1]
    return (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(-1, keepdim=True)


def shortened(vector: Sequence[float], dimensions: int) -> list[float]:
    """The first numbers of a vector, again of length 1 (models of the Matryoshka kind are trained for it)."""
    cut = torch.tensor(vector[:dimensions], dtype=torch.float64)
    found: list[float] = F.normalize(cut, dim=-1).tolist()
    return found


def _pooling(directory: Path, model_type: str) -> Pooling:
    if not (directory / POOLING).is_file():
        return "last" if model_type in CAUSAL else "mean"
    try:
        asked = json.loads((directory / POOLING).read_text())
        modes = [key for key, value in asked.items() if key.startswith("pooling_mode_") and value is True]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{directory / POOLING} is damaged: {error}.") from None
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"{directory} pools by {', '.join(modes) or 'nothing'}, which is not supported.",
            f"Supported: {', '.join(POOLINGS)}.",
        )
    return POOLINGS[modes[0]]
