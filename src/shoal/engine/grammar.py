"""Completions that must match: a JSON schema, a regular expression or a grammar, by `llguidance`.

A grammar is compiled once (milliseconds; it releases the interpreter's lock), and each completion gets a copy, which
says before each token which tokens may follow. The engine masks the logits with that before it samples, so a reported
log-probability is that of the masked distribution; the learner asks for the same masks again (`masks`) and computes
its own log-probability under them. The ratio of the two is then that of the distributions that were really used, 1
under the same weights. The log-probability without a mask would be no such ratio: a policy that moves weight between
two forbidden tokens would seem to have moved away from what it did.

Invariants: a completion that ended by itself matches its grammar whole; what a grammar may cost is bounded, by its size
(`protocol.sampling`) and by llguidance's own limits on items and states, and one that exceeds them fails alone; the
masks depend on tokenizer, grammar and tokens alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError, ModelError
from shoal.protocol.sampling import MAX_GRAMMAR_BYTES, Grammar

MAX_COMPILED = 64
"""Grammars kept compiled; the oldest goes first."""

JSON_STYLE: Any = {"whitespace_flexible": False}
"""Small models get lost in white space that they are free to repeat."""


class Constraint:
    """What one completion must match, and how far it has come."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._packed: NDArray[np.uint8] | None = None
        """Which tokens may follow now, once somebody has asked."""

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may follow, bool [V]. Tokens that the tokenizer does not have may not."""
        bits = np.unpackbits(self.packed(vocab_size), bitorder="little", count=vocab_size)
        return torch.from_numpy(bits).view(torch.bool)

    def few(self, vocab_size: int, most: int) -> Tensor | None:
        """The tokens that may follow, ascending, int64; None where they are more than `most`."""
        packed = self.packed(vocab_size)
        (where,) = packed.nonzero()
        if len(where) > most:
            return None
        bits = np.unpackbits(packed[where, None], axis=1, bitorder="little").view(np.bool_)
        tokens = (8 * where[:, None] + np.arange(8))[bits]
        tokens = tokens[tokens < vocab_size]
        return torch.from_numpy(tokens) if len(tokens) <= most else None

    def packed(self, vocab_size: int) -> NDArray[np.uint8]:
        """As `allowed`, eight tokens a byte, the first in the lowest bit: [ceil(V / 8)]."""
        if self._packed is not None:
            return self._packed
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._packed = found = np.zeros((vocab_size + 7) // 8, dtype=np.uint8)
        width = min(len(mask), len(found))
        found[:width] = mask[:width]
        if not found.any():
            # A broken matcher allows nothing. Something must be drawn; `error` then ends the sequence.
            found[:] = 255
        return found

    def took(self, token: int) -> None:
        self._packed = None
        self._matcher.consume_token(token)

    def took_all(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens may follow, one after another; if so, they did."""
        self._packed = None
        return bool(self._matcher.consume_tokens(list(tokens)))

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """What went wrong inside the matcher; empty where nothing did."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: of `transformers`, a fast one.
        end_ids: tokens that end a completion.

    Raises:
        ModelError: llguidance cannot use this tokenizer.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int]) -> None:
        try:
            self._tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=sorted(end_ids) or None)
        except ValueError as error:
            raise ModelError(f"output cannot be constrained with this model's tokenizer: {error}.") from None
        self._compiled: dict[Grammar, LLMatcher] = {}
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """What one completion must match; raises `ConfigError` for a grammar that is malformed or too large."""
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
            with self._lock:
                if len(self._compiled) >= MAX_COMPILED:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[grammar] = matcher
        return Constraint(matcher.deep_copy())

    def allows(self, grammar: Grammar, tokens: Sequence[int]) -> bool:
        """Whether a completion under this grammar can begin with these tokens."""
        try:
            return self.constraint(grammar).took_all(tokens)
        except ConfigError:
            return False

    def masks(self, grammar: Grammar, tokens: Sequence[int], vocab_size: int) -> NDArray[np.uint8]:
        """Which tokens could be drawn where each of `tokens` was, packed: [N, ceil(V / 8)]; each of them could."""
        constraint = self.constraint(grammar)
        rows = np.empty((len(tokens), (vocab_size + 7) // 8), dtype=np.uint8)
        for row, token in zip(rows, tokens, strict=True):
            row[:] = constraint.packed(vocab_size)
            row[token // 8] |= 1 << token % 8
            constraint.took(token)
        return rows

    def json_schema(self, schema: dict[str, Any]) -> Constraint:
        """JSON that a schema describes; raises `ConfigError` for a schema that is malformed or too large."""
        return self.constraint(Grammar(kind="json_schema", text=json.dumps(schema)))

    def regex(self, pattern: str) -> Constraint:
        """Text that a regular expression matches whole."""
        return self.constraint(Grammar(kind="regex", text=pattern))

    def lark(self, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's dialect of Lark's notation."""
        return self.constraint(Grammar(kind="lark", text=grammar))

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            raise ConfigError(
                f"a grammar or schema of {len(grammar.text)} characters is too large.", "64 KiB is the limit."
            )
        try:
            if grammar.kind == "json_schema":
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_STYLE)
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            else:
                text = LLMatcher.grammar_from_lark(grammar.text)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}.") from None
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the grammar cannot be used: {matcher.get_error()}.")
        return matcher
