"""Continuous batching: sequences join and leave between any two steps, and a group's prompt is computed once.

`Batcher.step()` does one round: admit what fits (first in, first out), compute a piece of the new prompts (`prefill`),
draw the first token of those that are whole; then one decode pass for everything alive. It owns no thread and no clock.

A prompt that a live sequence has as well, computed under the same weights, is copied from its slot: the members of a
group need not arrive together. Where the engine is given a prefix store, beginnings that finished sequences had are
copied too. With speculation (`speculation.speculating`) a decode pass may give a sequence several tokens.

Invariants: a request is admitted only when its prompt and all the tokens it may draw fit the cache beside what is
alive, so nothing alive is ever evicted; live sequence i sits in cache slot i, and a wave's rows behind all of them;
each token carries the policy version in force when it was drawn, and no token of a request is drawn under a version
below its `min_version`; a request that waits for a version holds up nobody else.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.prefill import Wave, compute
from shoal.engine.prefix import PrefixStore, State, shared
from shoal.engine.sampling import alternatives, sample
from shoal.engine.sequence import Drawn, Key, Sequence
from shoal.engine.speculation.speculating import Answers, Speculation
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError
from shoal.protocol.sampling import Completion, FinishReason, SampleRequest

PREFILL_TOKENS = 8192
"""Padded prompt tokens admitted together and computed in one step, unless the engine is told otherwise: for rollouts,
whose prompts are short. A server takes far fewer, so that those who are alive are not kept waiting."""


class Batcher:
    """The engine's state between steps: waiting and live sequences, weights' version, cache."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        cache: KVCache,
        context_tokens: int,
        *,
        prefill_tokens: int | None = None,
        prefixes: PrefixStore | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.context_tokens = min(context_tokens, model.arch.context_tokens)
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS
        self.prefixes = prefixes
        self.speculation = speculation
        self.version = 0
        self.waiting: deque[Sequence] = deque()
        self.live: list[Sequence] = []
        self._wave: Wave | None = None
        self.held_swap: Callable[[], None] | None = None
        """Puts new weights in place once nothing is alive (`swapping`); nothing is admitted before."""
        self.tokens_drawn = 0
        self.prompt_tokens = 0
        self.reused_tokens = 0

    @property
    def num_filling(self) -> int:
        """Sequences whose prompts are being computed."""
        return len(self._wave.members) if self._wave else 0

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
        if self.speculation is not None and (self.waiting or self._wave is not None):
            self.speculation.forget()  # rows are going to change
        if self.held_swap is not None and not self.live and self._wave is None:
            held_swap, self.held_swap = self.held_swap, None
            held_swap()
        drew = self._wave is None and self.held_swap is None and self._admit()
        filling = self._wave is not None
        if filling:
            self._fill()
        worked = bool(drew or filling or self.live)
        if self.live:
            self._decode()
        return worked

    def swapped(self, version: int, *, amid: bool = False) -> None:
        """Tell of new weights: what was computed with the old ones is shared no more.

        Args:
            amid: the model has changed them itself within a step, and drops what is in flight.
        """
        self.version = version
        if self.prefixes is not None:
            self.prefixes.clear()
        if self.speculation is not None and not amid:
            self.speculation.forget()

    def cancel_all(self) -> None:
        """Complete everything that waits or lives as cancelled."""
        for sequence in (*self.waiting, *self.live, *(self._wave.members if self._wave else ())):
            sequence.cancelled = True
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.waiting if s.cancelled]:
            self.waiting.remove(sequence)
            self._finish(sequence, "cancelled")
        self._leave({s: "cancelled" for s in self.live if s.cancelled})
        if self._wave is not None and all(s.cancelled for s in self._wave.members):
            wave, self._wave = self._wave, None
            for sequence in wave.members:
                self._finish(sequence, "cancelled")

    def _admit(self) -> bool:
        """Let in the next waiting sequences that fit together with the live ones; whether some drew a token at once."""
        joined: list[Sequence] = []
        held: list[Sequence] = []
        known = self._known_prompts()
        new: dict[Key, Sequence] = {}
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
            if candidate.key not in known and candidate.key not in new:
                widest = max(widest, candidate.prompt_length)
                if joined and (len(new) + 1) * widest > self.prefill_tokens:
                    break
                new[candidate.key] = candidate
            joined.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(held))
        late = [s for s in joined if s.key in known]
        if late:
            self._join_late(late, known)
        if new:
            followers = [s for s in joined if s.key in new and new[s.key] is not s]
            self._wave = Wave(list(new.values()), followers, base=len(self.live))
        return bool(late)

    def _known_prompts(self) -> dict[Key, int]:
        """Prompts in the cache that were computed with the weights in place -> a slot that holds them."""
        return {s.key: slot for slot, s in enumerate(self.live) if s.prompt_version == self.version}

    def _join_late(self, late: list[Sequence], known: Mapping[Key, int]) -> None:
        """Sequences whose prompt a live one has already."""
        filled = len(self.live)
        self.live += late
        self.cache.reserve(len(self.live), max(s.length for s in self.live), filled)
        for slot, sequence in enumerate(late, start=filled):
            self._share(known[sequence.key], slot, sequence)
        self._draw_first(late)

    def _share(self, source: int, slot: int, sequence: Sequence) -> None:
        self.cache.copy(source, slot, sequence.prompt_length)
        other = self.live[source]
        sequence.prompt_hidden, sequence.prompt_version = other.prompt_hidden, self.version
        sequence.prompt_features = other.prompt_features

    def _fill(self) -> None:
        """Compute the wave's prompts, one step's budget of them; when they are whole, let its members join."""
        wave = self._wave
        assert wave is not None
        if wave.version != self.version:
            self._begin(wave)
        spent = 0
        for tokens in wave.work:
            spent += tokens
            if spent >= self.prefill_tokens:
                return
        if wave.version != self.version:
            return  # weights changed under the last piece: the wave begins again
        self._wave = None
        self._join(wave)

    def _begin(self, wave: Wave) -> None:
        """Copy what is known of the wave's prompts, and set out to compute the rest."""
        wave.version = self.version
        found = {s: self._known_beginning(s) for s in wave.leaders}
        wave.leaders.sort(key=lambda s: (found[s][1], -s.prompt_length))
        longest = max([wave.longest, *(s.length for s in self.live)])
        self.cache.reserve(wave.num_slots, longest, filled=len(self.live))
        for slot, leader in enumerate(wave.leaders, start=wave.base):
            source, length = found[leader]
            if not isinstance(source, int):
                self.cache.put(slot, source, leader.prompt[:length])
            elif length:
                self.cache.copy(source, slot, length)
        reused = [found[s][1] for s in wave.leaders]
        self.reused_tokens += sum(reused)
        self.prompt_tokens += sum(s.prompt_length for s in wave.leaders) - sum(reused)
        depths = self.speculation.depths if self.speculation is not None else ()
        wave.work = compute(self.model, self.cache, wave.leaders, reused, wave.base, self.prefill_tokens, depths)

    def _known_beginning(self, sequence: Sequence) -> tuple[State | int, int]:
        """Where the longest known beginning of a prompt lies, in the store or in a live slot, and its length.

        The prompt's last token is always computed: its hidden state is what the first token is drawn from.
        """
        if self.prefixes is None:
            return 0, 0
        self.prefixes.at(self.cache.generation)
        ids = sequence.prompt[:-1]
        best: tuple[State | int, int] = (0, 0)
        if (found := self.prefixes.find(ids, sequence.space)) is not None:
            best = found[0].state, found[1]
        for slot, other in enumerate(self.live):
            if other.prompt_version != self.version or other.space != sequence.space:
                continue
            if (length := shared(other.prompt, ids)) > best[1]:
                best = slot, length
        return best

    def _join(self, wave: Wave) -> None:
        """Let a wave's members live: leaders close the gap that others left meanwhile, followers get their copies."""
        rows: dict[Key, int] = {}
        gone = {s for s in wave.members if s.cancelled}  # looked at once: callers cancel from other threads
        followers = [s for s in wave.followers if s not in gone]
        joined: list[Sequence] = []
        for source, leader in enumerate(wave.leaders, start=wave.base):
            heir = leader
            if leader in gone:
                found = next((s for s in followers if s.key == leader.key), None)
                if found is None:
                    continue
                followers.remove(found)
                found.prompt_hidden, heir = leader.prompt_hidden, found
                found.prompt_features = leader.prompt_features
            slot = len(self.live)
            if slot != source:
                self.cache.copy(source, slot, heir.prompt_length)
            heir.prompt_version = wave.version
            rows[heir.key] = slot
            self.live.append(heir)
            joined.append(heir)
        for follower in followers:
            self.live.append(follower)
            self._share(rows[follower.key], len(self.live) - 1, follower)
            joined.append(follower)
        for sequence in gone:
            self._finish(sequence, "cancelled")
        if joined:
            self._draw_first(joined)

    def _draw_first(self, members: list[Sequence]) -> None:
        """The token after the prompt; the head runs once for those that share one."""
        row_of: dict[Key, int] = {}
        hidden: list[Tensor] = []
        for sequence in members:
            if sequence.key not in row_of:
                assert sequence.prompt_hidden is not None
                row_of[sequence.key] = len(hidden)
                hidden.append(sequence.prompt_hidden)
        logits = self.model.logits(torch.stack(hidden))
        self._draw(members, logits[[row_of[s.key] for s in members]])

    def _decode(self) -> None:
        """One token for every live sequence, or several where drafts are accepted."""
        speculation = self.speculation
        if speculation is not None:
            answers = speculation.round(self.model, self.cache, self.live, self)
            if answers is not None:
                self._accept(answers)
                return
        device = self.model.device
        members, lengths = list(self.live), [s.length for s in self.live]
        self.reserve(max(lengths) + 1)
        ids = torch.tensor([[s.ids[-1]] for s in members], device=device)
        adapters = [s.adapter for s in members]
        start = torch.tensor(lengths, device=device)
        if speculation is None:
            hidden = self.model.forward(ids, start, self.cache, adapters=adapters)
            self._draw(members, self.model.logits(hidden[:, 0]))
            return
        land, _ = self.model.launch(ids, start, self.cache, adapters=adapters, depths=speculation.depths)
        if (passed := land()) is not None:  # else its ring broke, and the next step does it again
            began = time.perf_counter()
            finished = self._sampled(members, self.model.logits(passed.hidden_BTH[:, 0]))
            speculation.stepped(members, passed, time.perf_counter() - began)
            self._leave(finished)

    def fits(self, longest: int) -> bool:
        """Whether every live row may have so many positions, beside the prompts that are being computed."""
        return self.cache.fits(self._wave.num_slots if self._wave else len(self.live), longest)

    def reserve(self, longest: int) -> None:
        """Room in the cache for so many positions of every live row, and for the prompts that are being computed."""
        slots, filled, wave = len(self.live), len(self.live), self._wave
        if wave is not None:
            slots, filled, longest = wave.num_slots, wave.base + len(wave.leaders), max(longest, wave.longest)
        self.cache.reserve(slots, longest, filled)

    def _accept(self, answers: Answers) -> None:
        """Record what a round of drafts has given; what comes behind a sequence's end is dropped."""
        finished = self._sampled(list(answers.others), answers.logits) if answers.logits is not None else {}
        for sequence, verdict in answers.verdicts:
            for token, logprob in zip(verdict.tokens, verdict.logprobs, strict=True):
                if (reason := self._record(sequence, token, logprob)) is not None:
                    finished[sequence] = reason
                    break
        self._leave(finished)

    def _draw(self, members: list[Sequence], logits: Tensor) -> None:
        """Sample, record, and let finished sequences leave."""
        self._leave(self._sampled(members, logits))

    def _sampled(self, members: list[Sequence], logits: Tensor) -> dict[Sequence, FinishReason]:
        """Draw and record one token for each; who is finished by that."""
        params = [s.request.params for s in members]
        shapers = [s.shaper for s in members]
        shaped = shapers if any(shaper is not None for shaper in shapers) else ()
        tokens, logprobs = sample(logits, params, [s.uniform() for s in members], shaped)
        finished: dict[Sequence, FinishReason] = {}
        for row, (sequence, token, logprob) in enumerate(zip(members, tokens, logprobs, strict=True)):
            top: tuple[tuple[int, float], ...] = ()
            if sequence.on_token is not None and sequence.shaper is not None and sequence.shaper.num_top:
                top = alternatives(logits[row], params[row], sequence.shaper)
            if (reason := self._record(sequence, token, logprob, top)) is not None:
                finished[sequence] = reason
        return finished

    def _record(
        self, sequence: Sequence, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()
    ) -> FinishReason | None:
        if math.isnan(logprob):
            return "error"  # weights that have diverged; nothing was drawn
        self.tokens_drawn += 1
        return sequence.take(Drawn(token, logprob, top), self.version, self.tokenizer)

    def _leave(self, finished: Mapping[Sequence, FinishReason]) -> None:
        """Remove sequences; the last live one moves into each hole."""
        if self.speculation is not None and finished:
            self.speculation.forget()
            for sequence in finished:
                self.speculation.left(sequence)
        for slot in range(len(self.live) - 1, -1, -1):
            sequence = self.live[slot]
            if sequence not in finished:
                continue
            if finished[sequence] == "error":
                self.cache.clear(slot)
            else:
                self._remember(sequence, slot)
            mover = self.live.pop()
            if mover is not sequence:
                self.live[slot] = mover
                self.cache.copy(len(self.live), slot, mover.length)
            self._finish(sequence, finished[sequence])

    def _remember(self, sequence: Sequence, slot: int) -> None:
        """Keep a finished sequence's keys and values, if all of them are of the weights in place."""
        if self.prefixes is None or {sequence.prompt_version, *sequence.versions} != {self.version}:
            return
        self.prefixes.at(self.cache.generation)
        ids = (*sequence.prompt, *sequence.ids)[: sequence.length]
        if self.prefixes.wants(ids, self.cache.token_bytes, sequence.space):
            self.prefixes.add(ids, self.cache.take(slot, len(ids)), sequence.space)

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
