"""Completions that must match: a JSON schema, a regular expression or a grammar, by `llguidance`.

A grammar is compiled once a request (milliseconds; it releases the interpreter's lock) and then says, before each
token, which tokens may follow.

Invariants: a completion that ended by itself matches its grammar whole; what a grammar may cost is bounded, by its size
here and by llguidance's own limits on items and states, and one that exceeds them fails alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from shoal.errors import ConfigError, ModelError

MAX_GRAMMAR_BYTES = 64 * 1024
"""Larger grammars and schemas are refused."""

JSON_STYLE: Any = {"whitespace_flexible": False}
"""Small models get lost in white space that they are free to repeat."""

_BITS = torch.arange(32, dtype=torch.int32)


class Constraint:
    """What one completion must match, and how far it has come."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may follow, bool [V]. Tokens that the tokenizer does not have may not."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        bits = ((mask[:, None] >> _BITS) & 1).bool().flatten()[:vocab_size]
        if not bits.any():
            # A broken matcher allows nothing. Something must be drawn; `error` then ends the sequence.
            return torch.ones(vocab_size, dtype=torch.bool)
        return torch.nn.functional.pad(bits, (0, vocab_size - len(bits)))

    def took(self, token: int) -> None:
        self._matcher.consume_token(token)

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

    def json_schema(self, schema: dict[str, Any]) -> Constraint:
        """JSON that a schema describes; raises `ConfigError` for a schema that is malformed or too large."""
        _check_size(json.dumps(schema))
        try:
            return self._compiled(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}.") from None

    def regex(self, pattern: str) -> Constraint:
        """Text that a regular expression matches whole."""
        _check_size(pattern)
        return self._compiled(LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's dialect of Lark's notation."""
        _check_size(grammar)
        return self._compiled(LLMatcher.grammar_from_lark(grammar))

    def _compiled(self, grammar: str) -> Constraint:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the grammar cannot be used: {matcher.get_error()}.")
        return Constraint(matcher)


def _check_size(text: str) -> None:
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise ConfigError(f"a grammar or schema of {len(text)} characters is too large.", "64 KiB is the limit.")
