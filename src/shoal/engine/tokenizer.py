"""Text to token ids once, token ids to text whenever people want to read: chat template, continuation, stop strings.

Invariant: an agent's own tokens are never re-encoded. A conversation's first prompt is rendered by the chat template;
what follows an act is only the template's *continuation* (end of the assistant's turn, the new observation, the next
assistant header), appended to the token ids that were really sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.protocol.chat import Message

_MARK = "\u241eACT\u241e"
"""Stands where the assistant's own tokens go when the template's continuation is cut out."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Args:
        directory: holds `tokenizer.json` and its configuration.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"no usable tokenizer in {directory}: {error}.", "The checkpoint is incomplete.") from None
        self.hf = self._inner
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        ends: set[int] = set()
        if (directory / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
            ends |= _as_set(generation.eos_token_id)
        ends |= _as_set(getattr(config, "eos_token_id", None)) | _as_set(self._inner.eos_token_id)
        self.end_ids = frozenset(ends)

    @property
    def vocab_size(self) -> int:
        return len(self._inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens written in it are not interpreted."""
        return list(self._inner.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next."""
        if not self._inner.chat_template:
            return self.encode("\n\n".join(m.content for m in messages) + "\n\n")
        text = self._render([{"role": m.role, "content": m.content} for m in messages])
        return self._encode_template(text)

    def continuation(self, previous_ids: Sequence[int], observation: str) -> list[int]:
        """Token ids between an act and the next one.

        Args:
            previous_ids: the tokens the assistant drew; if the last one is its end token, it isn't repeated.
            observation: what the environment answers, as a user message.
        """
        if not self._inner.chat_template:
            return self.encode(f"\n\n{observation}\n\n")
        text = self._render(
            [
                {"role": "user", "content": "."},
                {"role": "assistant", "content": _MARK},
                {"role": "user", "content": observation},
            ]
        )
        ids = self._encode_template(text.split(_MARK, 1)[1])
        if previous_ids and ids and previous_ids[-1] in self.end_ids and ids[0] in self.end_ids:
            ids = ids[1:]
        return ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode_template(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False))

    def ends_with_stop(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one of the stop strings is completed by the newest token."""
        if not stop:
            return False
        window = max(len(s.encode()) for s in stop) + 1
        return any(s in self.decode(ids[-window:]) for s in stop)

    def visible(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Text of a completion, cut before the first stop string."""
        text = self.decode(ids)
        cut = min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))
        return text[:cut]


def _as_set(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
