"""Token ids in, token ids out: the request and the completion that every engine, pipeline and remote server share.

Invariants: a completion carries, for each of its tokens, the log-probability it was really sampled with (after
temperature and grammar, in nats) and the policy version it was sampled under. Text is derived from token ids and
never tokenised again.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

from shoal.errors import RecordError
from shoal.protocol.codec import Record

MAX_PROMPT_TOKENS = 1 << 20
"""No request with a longer prompt is looked at, whatever the model's context."""

MAX_GRAMMAR_BYTES = 64 * 1024
"""Larger grammars and schemas are refused."""

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: an end token or a stop string; `length`: the token limit; the others are infrastructure's doing."""


SwapPolicy = Literal["keep", "recompute", "finish"]
"""What becomes of completions under way when new weights are put in place: they go on with the cache they have, with a
cache computed again under the new weights, or end first under the old ones."""


class SamplingParams(Record, frozen=True):
    """How tokens are drawn."""

    max_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those of the untempered distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the token that completes one is the last token kept."""
    seed: int | None = None

    def check(self) -> None:
        if self.max_tokens < 1 or self.max_tokens > MAX_PROMPT_TOKENS:
            raise RecordError(f"max_tokens = {self.max_tokens} is not between 1 and {MAX_PROMPT_TOKENS}.")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise RecordError(f"temperature = {self.temperature} is not between 0 and 100.")
        if not 0 < self.top_p <= 1:
            raise RecordError(f"top_p = {self.top_p} is not in (0, 1].")
        if self.top_k < 0:
            raise RecordError(f"top_k = {self.top_k} is negative.")
        if len(self.stop) > 16 or any(not s or len(s) > 256 for s in self.stop):
            raise RecordError("stop takes at most 16 strings of 1 to 256 characters.")

    @property
    def is_exact(self) -> bool:
        """Whether the reported log-probabilities are those of the whole tempered distribution (no truncation)."""
        return self.top_p == 1.0 and self.top_k == 0


class Grammar(Record, frozen=True):
    """What a completion must match, as text: the same text means the same tokens wherever it is read."""

    kind: Literal["json_schema", "regex", "lark"]
    """`lark` is llguidance's dialect of Lark's notation."""
    text: str

    def check(self) -> None:
        if not self.text or len(self.text.encode(errors="surrogatepass")) > MAX_GRAMMAR_BYTES:
            raise RecordError(f"a grammar of {len(self.text)} characters is not of 1 to {MAX_GRAMMAR_BYTES} bytes.")


class SampleRequest(Record, frozen=True):
    """One prompt to complete."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    min_version: int = 0
    """The engine may not sample the first token under an older policy version than this."""
    grammar: Grammar | None = None

    def check(self) -> None:
        self.params.check()
        if self.grammar is not None:
            self.grammar.check()
        if not 1 <= len(self.prompt_ids) <= MAX_PROMPT_TOKENS:
            raise RecordError(f"a prompt of {len(self.prompt_ids)} tokens is not between 1 and {MAX_PROMPT_TOKENS}.")
        if min(self.prompt_ids) < 0:
            raise RecordError("a prompt has a negative token id.")


class Completion(Record, frozen=True):
    """What was sampled for one request. All three tuples have one entry a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish: FinishReason
    text: str
    """Derived from `token_ids`, special tokens and a final stop string left out."""

    def check(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions):
            raise RecordError("a completion's tokens, log-probabilities and versions differ in number.")
        if any(not math.isfinite(x) or x > 1e-3 for x in self.logprobs):
            raise RecordError("a completion has a log-probability that is positive or not finite.")
        if any(v < 0 for v in self.versions) or any(t < 0 for t in self.token_ids):
            raise RecordError("a completion has a negative version or token id.")


class Sampler(Protocol):
    """Anything that turns requests into completions: the local engine, a pipeline of stages, a remote server."""

    async def sample(self, request: SampleRequest) -> Completion:
        """Complete one request; concurrent calls are batched by the sampler.

        Raises:
            CapacityError: the request can never fit.
        """
        ...
