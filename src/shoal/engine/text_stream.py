"""A completion's text while it is being drawn: whole characters, and nothing that a stop string may still take back.

Invariant: the pieces, joined, are the completion's text (`Tokenizer.visible`); work a token does not grow with the
completion's length.
"""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from shoal.engine.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into pieces of text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._inner = tokenizer.hf.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self._num_shown = 0
        self._ended = False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._held += self._decoder.step(self._inner, token) or ""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found or self._ended:
            self._ended = True
            return ""  # what stands before the stop string comes with the rest
        certain = len(self._held) - _begun(self._held, self._stop)
        piece, self._held = self._held[:certain], self._held[certain:]
        self._num_shown += len(piece)
        return piece

    def rest(self, text: str) -> str:
        """What remains to be shown of the whole text."""
        return text[self._num_shown :]


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    begun = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(begun, default=0)
