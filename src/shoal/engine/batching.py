"""Continuous batching: sequences join and leave between any two steps, and a group's prompt is computed once.

`Batcher.step()` does one round: admit what fits (first in, first out), prefill the new prompts, draw their first
token; then one decode pass for everything alive. It owns no thread and no clock.

A prompt that a live sequence has as well, computed under the same weights, is copied from its slot: the members of a
group need not arrive together.

Invariants: a request is admitted only when its prompt and all the tokens it may draw fit the cache beside what is
alive, so nothing alive is ever evicted; live sequence i sits in cache slot i; each token carries the policy version
in force when it was drawn, and no token of a request is drawn under a version below its `min_version`; a request that
waits for a version holds up nobody else.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.sampling import sample
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError
from shoal.protocol.sampling import Completion, FinishReason, SampleRequest

PREFILL_WIDTH = 512
"""Longer prompts are prefilled in pieces of this many tokens, which bounds the activations' memory."""

PREFILL_TOKENS = 8192
"""Padded prompt tokens admitted in one step; the rest waits for the next, so that decoding is not starved."""


@dataclass(eq=False)
class Sequence:
    """One request on its way through the engine."""

    request: SampleRequest
    on_done: Callable[[Completion], None]
    on_token: Callable[[int], None] | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    cancelled: bool = False
    prompt_hidden: Tensor | None = None
    """Hidden state at the prompt's last token, [H]; from it, others with this prompt draw their first token."""
    prompt_version: int = -1
    """The policy version under which the prompt was computed."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.request.params.seed)

    def uniform(self) -> float:
        """This sequence's next random number: a stream of its own, so the batch's company changes nothing."""
        return self._random.random()

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Positions filled in the cache: every token but the newest, which the next pass will write."""
        return self.prompt_length + max(0, len(self.ids) - 1)

    @property
    def most_tokens(self) -> int:
        return self.prompt_length + self.request.params.max_tokens


class Batcher:
    """The engine's state between steps: waiting and live sequences, weights' version, cache."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, cache: KVCache, context_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.context_tokens = min(context_tokens, model.arch.context_tokens)
        self.version = 0
        self.waiting: deque[Sequence] = deque()
        self.live: list[Sequence] = []
        self.tokens_drawn = 0
        self.prompt_tokens = 0

    def check(self, request: SampleRequest) -> None:
        """Raise `CapacityError` if the request could not be served even alone."""
        params = request.params
        total = len(request.prompt_ids) + params.max_tokens
        if total > self.context_tokens:
            raise CapacityError(
                f"a prompt of {len(request.prompt_ids)} tokens and max_tokens = {params.max_tokens} "
                f"exceed the context of {self.context_tokens} tokens.",
                "Shorten the prompt, lower max_tokens, or raise model.context_tokens.",
            )
        if not self.cache.fits(1, total):
            raise CapacityError(
                f"a request of {total} tokens does not fit a cache of "
                f"{self.cache.budget_bytes // self.cache.token_bytes} tokens.",
                "Raise cache_tokens, lower max_tokens, or shorten the prompt.",
            )
        if max(request.prompt_ids) >= self.model.arch.vocab_size:
            raise CapacityError(f"token id {max(request.prompt_ids)} is outside the model's vocabulary.")

    def step(self) -> bool:
        """One round of work; False when there was nothing to do."""
        self._drop_cancelled()
        joined = self._admit()
        if joined:
            self._prefill(joined)
        worked = bool(joined or self.live)
        if self.live:
            self._decode()
        return worked

    def cancel_all(self) -> None:
        """Complete everything that waits or lives as cancelled."""
        for sequence in (*self.waiting, *self.live):
            sequence.cancelled = True
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.waiting if s.cancelled]:
            self.waiting.remove(sequence)
            self._finish(sequence, "cancelled")
        self._leave({s: "cancelled" for s in self.live if s.cancelled})

    def _admit(self) -> list[Sequence]:
        """The next waiting sequences that fit together with the live ones."""
        joined: list[Sequence] = []
        held: list[Sequence] = []
        known = self._known_prompts()
        new: set[tuple[int, ...]] = set()
        tokens = max((s.most_tokens for s in self.live), default=0)
        widest = 0
        while self.waiting:
            candidate = self.waiting[0]
            if candidate.request.min_version > self.version:
                held.append(self.waiting.popleft())
                continue
            tokens = max(tokens, candidate.most_tokens)
            if not self.cache.fits(len(self.live) + len(joined) + 1, tokens):
                break
            if candidate.prompt not in known:
                new.add(candidate.prompt)
                widest = max(widest, candidate.prompt_length)
            if joined and len(new) * widest > PREFILL_TOKENS:
                break
            joined.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(held))
        return joined

    def _known_prompts(self) -> dict[tuple[int, ...], int]:
        """Prompts in the cache that were computed with the weights in place -> a slot that holds them."""
        return {s.prompt: slot for slot, s in enumerate(self.live) if s.prompt_version == self.version}

    def _prefill(self, joined: list[Sequence]) -> None:
        """Compute each new prompt once, copy its cache to the sequences that share it, draw first tokens."""
        slot_of = self._known_prompts()
        leaders: dict[tuple[int, ...], Sequence] = {}
        for sequence in joined:
            if sequence.prompt not in slot_of:
                leaders.setdefault(sequence.prompt, sequence)
        # Longest first: the rows that still have tokens in a later piece are then the first ones.
        ordered = sorted(leaders.values(), key=lambda s: -s.prompt_length)
        followers = [s for s in joined if leaders.get(s.prompt) is not s]
        filled = len(self.live)
        slot_of |= {s.prompt: slot for slot, s in enumerate(ordered, start=filled)}
        self.live += [*ordered, *followers]
        longest = max(s.length for s in self.live)
        self.cache.reserve(len(self.live), longest, filled)
        if ordered:
            hidden = self._prompt_hidden([s.prompt for s in ordered], filled)
            for row, leader in enumerate(ordered):
                leader.prompt_hidden, leader.prompt_version = hidden[row], self.version
        for slot, sequence in enumerate(followers, start=filled + len(ordered)):
            source = slot_of[sequence.prompt]
            self.cache.copy(source, slot, sequence.prompt_length)
            sequence.prompt_hidden, sequence.prompt_version = self.live[source].prompt_hidden, self.version
        self.prompt_tokens += sum(s.prompt_length for s in ordered)
        self._draw_first(self.live[filled:])

    def _prompt_hidden(self, prompts: list[tuple[int, ...]], first_slot: int) -> Tensor:
        """Hidden state at each prompt's last token, [prompts, H]; the prompts come longest first."""
        device = self.model.device
        width = len(prompts[0])
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
        last = torch.tensor([len(p) - 1 for p in prompts], device=device)
        found = torch.zeros(len(prompts), self.model.arch.hidden_size, dtype=self.model.dtype, device=device)
        for start in range(0, width, PREFILL_WIDTH):
            unfinished = sum(len(p) > start for p in prompts)
            piece = ids[:unfinished, start : start + PREFILL_WIDTH]
            offset = torch.full((unfinished,), start, device=device)
            hidden = self.model.forward(piece, offset, self.cache, first_slot)
            rows = (last[:unfinished] < start + piece.shape[1]).nonzero()[:, 0]
            found[rows] = hidden[rows, last[rows] - start]
        return found

    def _draw_first(self, members: list[Sequence]) -> None:
        """The token after the prompt; the head runs once for those that share one."""
        row_of: dict[tuple[int, ...], int] = {}
        hidden: list[Tensor] = []
        for sequence in members:
            if sequence.prompt not in row_of:
                assert sequence.prompt_hidden is not None
                row_of[sequence.prompt] = len(hidden)
                hidden.append(sequence.prompt_hidden)
        logits = self.model.logits(torch.stack(hidden))
        self._draw(members, logits[[row_of[s.prompt] for s in members]])

    def _decode(self) -> None:
        """One token for every live sequence."""
        device = self.model.device
        lengths = [s.length for s in self.live]
        self.cache.reserve(len(self.live), max(lengths) + 1, filled=len(self.live))
        ids = torch.tensor([[s.ids[-1]] for s in self.live], device=device)
        hidden = self.model.forward(ids, torch.tensor(lengths, device=device), self.cache)
        self._draw(list(self.live), self.model.logits(hidden[:, 0]))

    def _draw(self, members: list[Sequence], logits: Tensor) -> None:
        """Sample, record, and let finished sequences leave."""
        params = [s.request.params for s in members]
        tokens, logprobs = sample(logits, params, [s.uniform() for s in members])
        finished: dict[Sequence, FinishReason] = {}
        for sequence, token, logprob in zip(members, tokens, logprobs, strict=True):
            if math.isnan(logprob):
                finished[sequence] = "error"  # weights that have diverged; nothing was drawn
                continue
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.versions.append(self.version)
            self.tokens_drawn += 1
            if sequence.on_token is not None:
                sequence.on_token(token)
            ended = token in self.tokenizer.end_ids
            if ended or self.tokenizer.ends_with_stop(sequence.ids, sequence.request.params.stop):
                finished[sequence] = "stop"
            elif len(sequence.ids) >= sequence.request.params.max_tokens:
                finished[sequence] = "length"
        self._leave(finished)

    def _leave(self, finished: Mapping[Sequence, FinishReason]) -> None:
        """Remove sequences; the last live one moves into each hole."""
        for slot in range(len(self.live) - 1, -1, -1):
            sequence = self.live[slot]
            if sequence not in finished:
                continue
            if finished[sequence] == "error":
                self.cache.clear(slot)
            mover = self.live.pop()
            if mover is not sequence:
                self.live[slot] = mover
                self.cache.copy(len(self.live), slot, mover.length)
            self._finish(sequence, finished[sequence])

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.on_done(
            Completion(
                token_ids=tuple(sequence.ids),
                logprobs=tuple(sequence.logprobs),
                versions=tuple(sequence.versions),
                finish=reason,
                text=self.tokenizer.visible(sequence.ids, sequence.request.params.stop),
            )
        )
