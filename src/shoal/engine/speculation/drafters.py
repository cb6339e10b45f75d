"""Drafters by what the user named: look-up, a head's folder, or a smaller checkpoint.

Invariant: a drafter's weights are loaded once, however many batches draft with them; its caches are each batch's own,
and hold whatever that batch's admission has let in.
"""

from __future__ import annotations

import torch

from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import is_head, load_head
from shoal.engine.speculation.ngram import NgramDrafter
from shoal.engine.speculation.student import StudentDrafter
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError

SLACK_TOKENS = 256
"""More than a sequence's own tokens that a drafter's cache has room for: what it drafts ahead, and rounding."""


class Drafters:
    """Makes drafters for one target.

    Args:
        draft: a head or a smaller checkpoint; none: look-up.
        tree_width: tokens proposed at each depth.

    Raises:
        ModelError: it is damaged, or made for another model.
    """

    def __init__(
        self,
        draft: LocalModel | None,
        target: LocalModel,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tree_width: int = 1,
    ) -> None:
        self._width = tree_width
        self._head = self._student = None
        if draft is None:
            return
        config = draft.config()
        if is_head(config):
            self._head = load_head(draft.directory, target, dtype, device)
            return
        if Tokenizer(draft.directory).hf.get_vocab() != Tokenizer(target.directory).hf.get_vocab():
            raise ModelError(
                f"{draft.name} has another tokenizer than {target.name}.", "A drafter needs the target's tokenizer."
            )
        self._student = Decoder(config, dtype, device)
        self._student.load(draft.tensors())
        self._vocab_size = target.config().vocab_size

    def make(self, max_slots: int, max_tokens: int) -> Drafter:
        """One for a batch of so many sequences with so many tokens together."""
        max_tokens += max_slots * SLACK_TOKENS
        if self._head is not None:
            return EagleDrafter(self._head, max_slots, max_tokens, self._width)
        if self._student is None:
            return NgramDrafter(width=self._width)
        decoder = self._student
        arch = decoder.arch
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * decoder.dtype.itemsize
        sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, max_slots, max_tokens * token_bytes
        cache = KVCache(*sizes, decoder.dtype, decoder.device)
        return StudentDrafter(decoder, cache, self._vocab_size, self._width)
