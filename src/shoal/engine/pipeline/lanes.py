"""The engine over a ring of stages: as many whole engines as batches are under way, behind one face.

Invariants: a request stays in one lane; lanes share nothing but the head's weights and the ring; where there is no
ring for longer than is worth waiting, what is alive ends as `cancelled`, and the lanes live on for the next one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from shoal.broadcast.tensors import TensorView
from shoal.engine.batching import Batcher
from shoal.engine.grammar import Constraint, Grammars
from shoal.engine.local import LocalEngine
from shoal.engine.model import HEAD, Decoder
from shoal.engine.pipeline.remote import RemoteCache, RemoteDecoder
from shoal.engine.pipeline.ring import Interrupted, Rings, Weights
from shoal.engine.pipeline.wire import TYPES
from shoal.engine.prefix import PrefixStore
from shoal.engine.sequence import Drawn
from shoal.engine.shaping import PLAIN, Shaping
from shoal.engine.source import LocalModel
from shoal.engine.speculation.speculating import Speculation
from shoal.engine.stats import EngineStats
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError
from shoal.protocol.sampling import Completion, Grammar, SampleRequest

MAX_PAST = 256
"""Prompts remembered, so that a conversation's next turn finds the lane that has its beginning."""

CPU = torch.device("cpu")


class Lane(LocalEngine):
    """One batch: a local engine whose layers are elsewhere."""

    def __init__(
        self, batcher: Batcher, threads: int, grammars: Callable[[], Grammars], adopt: Callable[[], None]
    ) -> None:
        self._all_grammars = grammars
        self._adopt = adopt
        self._start(batcher, threads)

    def _constraint(self, grammar: Grammar) -> Constraint:
        return self._all_grammars().constraint(grammar)

    def adopted(self, version: int) -> None:
        """All is computed with weights of this version from now on; told on this lane's thread."""
        self._batcher.swapped(version, amid=True)

    def _step(self) -> bool:
        if not self._batcher.live and not self._batcher.num_filling:
            self._adopt()
        try:
            return super()._step()
        except Interrupted:
            self._batcher.cancel_all()
            return False


class PipelineEngine:
    """A `Sampler` whose layers are on the stages of `rings`, and what `serving` needs of an engine.

    Args:
        model: config, tokenizer and the head's weights.
        lanes: batches under way together.
        max_sequences, cache_tokens, prefix_tokens: over all lanes; each has its share.
        threads: CPU threads for the head and for sampling, of each lane.
        speculate: makes what drafts for a lane of so many sequences and tokens together.

    Raises:
        ModelError: the checkpoint is incomplete, damaged or of an unsupported type.
    """

    def __init__(
        self,
        model: LocalModel,
        rings: Rings,
        *,
        dtype: str,
        lanes: int,
        threads: int,
        max_sequences: int,
        cache_tokens: int,
        context_tokens: int,
        prefill_tokens: int | None = None,
        prefix_tokens: int = 0,
        speculate: Callable[[int, int], Speculation] | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self._rings = rings
        self.lane_slots = max(1, -(-max_sequences // lanes))
        self.lane_tokens = max(1, cache_tokens // lanes)
        self.lane_prefix_tokens = prefix_tokens // lanes
        self.tokenizer = Tokenizer(model.directory)
        self._config = config = model.config()
        tensors = model.tensors()
        self._decoders = [RemoteDecoder(config, TYPES[dtype], CPU, rings, lane) for lane in range(lanes)]
        self._decoders[0].load(tensors)
        for decoder in self._decoders[1:]:
            decoder.share(self._decoders[0])
        self.num_layers = self._decoders[0].arch.num_layers
        caches = [RemoteCache(decoder, self.lane_slots, self.lane_tokens) for decoder in self._decoders]
        self.lanes = [
            Lane(
                Batcher(
                    decoder,
                    self.tokenizer,
                    cache,
                    context_tokens,
                    prefill_tokens=prefill_tokens,
                    prefixes=PrefixStore(self.lane_prefix_tokens * cache.token_bytes, cache.forgets)
                    if self.lane_prefix_tokens
                    else None,
                    speculation=speculate(self.lane_slots, self.lane_tokens) if speculate else None,
                ),
                threads,
                lambda: self.grammars,
                partial(self._adopt, decoder),
            )
            for decoder, cache in zip(self._decoders, caches, strict=True)
        ]
        for decoder, lane in zip(self._decoders, self.lanes, strict=True):
            decoder.on_weights = lane.adopted
        self.changes: Callable[[int, Mapping[str, TensorView]], Awaitable[float]] | None = None
        """Puts other weights on the stages; set by whoever has these."""
        self._loads = [0] * lanes
        self._past: OrderedDict[tuple[int, ...], int] = OrderedDict()
        """Prompts that were served, and in which lane."""
        self._prompts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(lanes)]

    @property
    def version(self) -> int:
        ring = self._rings.ring
        return ring.weights.version if ring is not None and ring.weights is not None else self.lanes[0].version

    def _adopt(self, decoder: RemoteDecoder) -> None:
        decoder.adopt(self._rings.ring)

    def make_weights(self, version: int, tensors: Mapping[str, Tensor]) -> Weights:
        """What a ring of stages with these weights needs here.

        Raises:
            ModelError: they are not this model's.
        """
        head = Decoder(self._config, self._decoders[0].dtype, CPU, HEAD)
        head.load(tensors)
        return Weights(version, head)

    async def load_weights(self, version: int, tensors: Mapping[str, TensorView]) -> float:
        """Serve other weights on all stages at once; gives the seconds for which nothing was computed.

        What is alive is computed again with them and goes on, whatever the swap policy of a single machine is.

        Raises:
            ModelError: they are not this model's, or a lossy rule drafts, or nobody has the stages; the old ones stay.
        """
        if self.lossy_rule:
            raise ModelError(
                f"an engine that drafts by the rule {self.lossy_rule} takes no other weights: what it says is not the "
                "policy's.",
                "Use the rule strict where rollouts are drawn.",
            )
        if self.changes is None:
            raise ModelError("these stages' weights cannot be changed.", "Restart the server.")
        return await self.changes(version, tensors)

    @property
    def context_tokens(self) -> int:
        return self.lanes[0].context_tokens

    @property
    def lossy_rule(self) -> str:
        """The acceptance rule that may change what the model would have said; empty where none does."""
        return self.lanes[0].lossy_rule

    @property
    def is_alive(self) -> bool:
        return all(lane.is_alive for lane in self.lanes)

    @property
    def trouble(self) -> str:
        """Why nothing can be computed at the moment; empty where it can."""
        return self._rings.trouble

    @property
    def last_round(self) -> tuple[float, tuple[float, ...]]:
        """Seconds that the first lane's last step took, and each stage for its part of it."""
        return self._decoders[0].round_s, self._decoders[0].stage_s

    @cached_property
    def grammars(self) -> Grammars:
        """Made on first use; one for all lanes."""
        return Grammars(self.tokenizer.hf, self.tokenizer.end_ids)

    def stats(self) -> EngineStats:
        """Sums over the lanes."""
        every = [lane.stats() for lane in self.lanes]
        sums = {name: sum(getattr(one, name) for one in every) for name in EngineStats.__annotations__}
        return EngineStats(**sums | {"rebuilt_tokens": sum(decoder.rebuilt_tokens for decoder in self._decoders)})

    def check(self, request: SampleRequest) -> None:
        """Raise what `sample` would raise for a request that can't be served.

        Raises:
            ModelError: there are no stages now.
        """
        if self.trouble:
            raise ModelError(self.trouble, "Try again when they are back.")
        self.lanes[0].check(request)

    async def sample(self, request: SampleRequest, shaping: Shaping = PLAIN) -> Completion:
        """Complete one request; the caller's cancellation frees the slot."""
        self.check(request)
        with self._lane(request) as lane:
            return await lane.sample(request, shaping)

    async def draws(self, request: SampleRequest, shaping: Shaping = PLAIN) -> AsyncGenerator[Drawn | Completion]:
        """Each token as soon as it is drawn, and last the completion; leaving early frees the slot."""
        self.check(request)
        with self._lane(request) as lane:
            async with aclosing(lane.draws(request, shaping)) as draws:
                async for drawn in draws:
                    yield drawn

    async def close(self) -> None:
        """End all lanes; whoever still waits gets a `cancelled` completion."""
        self._rings.close("the server is ending.", final=True)
        await asyncio.gather(*(lane.close() for lane in self.lanes))

    @contextmanager
    def _lane(self, request: SampleRequest) -> Iterator[Lane]:
        """Where the request goes: to others with its prompt or to what it continues, if there is a place; else where
        there are fewest."""
        prompt = request.prompt_ids
        known = [lane for lane, prompts in enumerate(self._prompts) if prompts[prompt]]
        known = known or self._continued(prompt)
        known = [lane for lane in known if self._loads[lane] < self.lane_slots]
        lane = min(known or range(len(self.lanes)), key=lambda lane: self._loads[lane])
        self._loads[lane] += 1
        self._prompts[lane][prompt] += 1
        try:
            yield self.lanes[lane]
        finally:
            self._loads[lane] -= 1
            self._past[prompt] = lane
            self._past.move_to_end(prompt)
            if len(self._past) > MAX_PAST:
                self._past.popitem(last=False)
            self._prompts[lane][prompt] -= 1
            if not self._prompts[lane][prompt]:
                del self._prompts[lane][prompt]

    def _continued(self, prompt: tuple[int, ...]) -> list[int]:
        """The lane of the longest prompt that this one begins with, where prefixes are kept."""
        if not self.lane_prefix_tokens:
            return []
        found = [past for past in self._past if prompt[: len(past)] == past]
        return [self._past[max(found, key=len)]] if found else []
