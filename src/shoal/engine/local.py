"""The local engine: an asyncio face on a batcher that runs in a thread of its own.

One thread owns model, cache and batcher; coroutines hand it work through its inbox (at most `MAX_REQUESTS` at a time)
and get completions back on their own loop. Weights are swapped by the same thread between two steps.

Invariants: nothing touches the model but the engine's thread; a coroutine that is cancelled frees its slot at the
next step; when the engine is closed or fails, everyone who waits for it is answered.

What happens to sequences that are alive when weights are swapped: `swapping`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import torch

from shoal.broadcast.tensors import TensorView
from shoal.engine.batching import Batcher
from shoal.engine.cache import KVCache
from shoal.engine.grammar import Constraint, Grammars
from shoal.engine.heap import keep_large_apart
from shoal.engine.lora import Adapter
from shoal.engine.model import Decoder
from shoal.engine.prefix import PrefixStore
from shoal.engine.sequence import Drawn, Sequence
from shoal.engine.shaping import PLAIN, Shaping
from shoal.engine.source import LocalModel
from shoal.engine.speculation.speculating import Speculation
from shoal.engine.stats import EngineStats, stats_of
from shoal.engine.swapping import swap
from shoal.engine.text_stream import TextStream
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import from_views
from shoal.errors import CapacityError, ConfigError, ModelError
from shoal.protocol.sampling import Completion, Grammar, SampleRequest, SwapPolicy

T = TypeVar("T")

MAX_REQUESTS = 4096
"""Requests beyond this many, waiting or alive, are refused at once."""

NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})

CLOSE_TIMEOUT_S = 30.0
"""The engine's thread ends within one step; a step that takes longer than this is a defect."""


class LocalEngine:
    """A `Sampler` on this machine.

    Args:
        model: where the checkpoint lies (`source.resolve`).
        dtype: `bf16` or `fp32`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads of torch in this process; one a process is fastest beside busy neighbours.
        max_sequences: sequences decoded together.
        cache_tokens: the key-value cache's budget, in tokens over all sequences.
        context_tokens: longest sequence, prompt and completion together; the model's own limit holds as well.
        prefill_tokens: prompt tokens computed between two decode steps; absent: enough for a rollout's whole batch.
        prefix_tokens: tokens of finished sequences kept for prompts that begin alike, beside the cache; 0 keeps none.
        int8: keep the layers' and the head's weights in 8 bits (`quantised`), for serving only: such an engine takes no
            other weights, and so no rollouts are drawn with it.
        adapters: folders of LoRA adapters, by the names that requests give (`lora`).
        on_swap: what becomes of sequences that are alive when weights change (`swapping`).
        speculation: drafts several tokens for one pass; with a lossy rule the engine takes no other weights either.

    Raises:
        ModelError: the checkpoint or an adapter is incomplete, damaged or of an unsupported type, or the device is not
            there.
    """

    def __init__(
        self,
        model: LocalModel,
        *,
        dtype: str = "bf16",
        device: str = "auto",
        threads: int = 1,
        max_sequences: int = 64,
        cache_tokens: int = 64 * 1024,
        context_tokens: int = 1024,
        prefill_tokens: int | None = None,
        prefix_tokens: int = 0,
        int8: bool = False,
        adapters: Mapping[str, Path] = NO_ADAPTERS,
        on_swap: SwapPolicy = "keep",
        speculation: Speculation | None = None,
    ) -> None:
        self._on_swap = on_swap
        keep_large_apart()
        torch.set_num_threads(threads)
        kind = pick_device(device)
        torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
        decoder = Decoder(model.config(), torch_dtype, kind, int8=int8)
        decoder.load(model.tensors())
        arch = decoder.arch
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * torch_dtype.itemsize
        cache = KVCache(
            arch.num_layers,
            arch.num_kv_heads,
            arch.head_dim,
            max_sequences,
            cache_tokens * token_bytes,
            torch_dtype,
            kind,
        )
        batcher = Batcher(
            decoder,
            Tokenizer(model.directory),
            cache,
            context_tokens,
            prefill_tokens=prefill_tokens,
            prefixes=PrefixStore(prefix_tokens * token_bytes) if prefix_tokens else None,
            speculation=speculation,
        )
        loaded = {name: decoder.adapter(name, folder) for name, folder in adapters.items()}
        self._start(batcher, threads, int8=int8, adapters=loaded)

    _on_swap: SwapPolicy = "keep"

    def _start(
        self, batcher: Batcher, threads: int, *, int8: bool = False, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        self._int8 = int8
        self._adapters = dict(adapters or {})
        self._batcher = batcher
        self.tokenizer = batcher.tokenizer
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_requests = 0
        self._busy_s = 0.0
        self._closed = False
        self._failure: BaseException | None = None
        self._pending: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="shoal-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def version(self) -> int:
        """The policy version of the weights in place."""
        return self._batcher.version

    @cached_property
    def grammars(self) -> Grammars:
        """Made on first use: it takes a second, and some tokenizers can't be used for it."""
        return Grammars(self.tokenizer.hf, self.tokenizer.end_ids)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that a request's shaping may give."""
        return tuple(self._adapters)

    @property
    def lossy_rule(self) -> str:
        """The acceptance rule that may change what the model would have said; empty where none does."""
        speculation = self._batcher.speculation
        return speculation.rule.name if speculation is not None and speculation.rule.lossy else ""

    @property
    def tensor_names(self) -> list[str]:
        """The tensors that `load_weights` must be given."""
        return self._batcher.model.tensor_names

    def stats(self) -> EngineStats:
        """A momentary view; consistent enough for people and rates."""
        return stats_of(self._batcher, self._busy_s)

    @property
    def is_alive(self) -> bool:
        """Whether requests are still answered."""
        return self._failure is None and not self._closed

    @property
    def trouble(self) -> str:
        """Why requests can't be answered at the moment, for people; empty where they can."""
        return ""

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and completion together."""
        return self._batcher.context_tokens

    def check(self, request: SampleRequest) -> None:
        """Raise what `sample` would raise for a request that can never be served."""
        request.check()
        self._batcher.check(request)

    async def sample(self, request: SampleRequest, shaping: Shaping = PLAIN) -> Completion:
        """Complete one request (see `Sampler`); the caller's cancellation frees the slot.

        Raises:
            ConfigError: the request's grammar is none, or there is no such adapter.
        """
        return await self._submit(request, shaping, None)

    async def draws(self, request: SampleRequest, shaping: Shaping = PLAIN) -> AsyncGenerator[Drawn | Completion]:
        """Each token as soon as it is drawn, and last the completion; leaving early frees the slot."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Drawn | None] = asyncio.Queue()  # never holds more than max_tokens

        def on_token(drawn: Drawn) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nobody listens
                loop.call_soon_threadsafe(arrived.put_nowait, drawn)

        task = asyncio.ensure_future(self._submit(request, shaping, on_token))
        task.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (drawn := await arrived.get()) is not None:
                yield drawn
            yield await task
        finally:
            task.cancel()

    async def stream(self, request: SampleRequest) -> AsyncIterator[str]:
        """The completion's text, piece by piece: whole characters, and nothing of a stop string."""
        text = TextStream(self.tokenizer, request.params.stop)
        async with aclosing(self.draws(request)) as draws:
            async for drawn in draws:
                piece = text.push(drawn.token) if isinstance(drawn, Drawn) else text.rest(drawn.text)
                if piece:
                    yield piece

    async def load_weights(self, version: int, tensors: Mapping[str, TensorView]) -> float:
        """Swap in a version between two steps; gives the pause in seconds.

        Raises:
            ModelError: tensors are missing or of another shape, this engine's weights are of 8 bits, or it drafts by a
                lossy rule; the old weights stay.
        """
        if self.lossy_rule:
            raise ModelError(
                f"an engine that drafts by the rule {self.lossy_rule} takes no other weights: what it says is not the "
                "policy's.",
                "Use the rule strict where rollouts are drawn.",
            )
        if self._int8:
            raise ModelError(
                "an engine whose weights have 8 bits takes no others: what it draws is not the policy's.",
                'Use weights = "full" where rollouts are drawn.',
            )
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        weights, policy = from_views(tensors), self._on_swap
        return await self._post(
            lambda: swap(self._batcher, version, weights, policy, lambda result: _answer(done, result)), done
        )

    async def drained(self, poll_s: float = 0.02) -> None:
        """Wait until nothing is alive or waiting in the engine."""
        while self._num_requests:
            self._raise_if_dead()
            await asyncio.sleep(poll_s)

    async def close(self) -> None:
        """End the thread; whoever still waits gets a `cancelled` completion."""
        self._closed = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        self._answer_all(ModelError("the engine is closed."))

    async def _submit(
        self, request: SampleRequest, shaping: Shaping, on_token: Callable[[Drawn], None] | None
    ) -> Completion:
        self.check(request)
        adapter = shaping.adapter
        if adapter and adapter not in self._adapters:
            raise ConfigError(f"there is no adapter '{adapter}'.", f"There are: {', '.join(self._adapters) or 'none'}.")
        if request.grammar is not None:
            shaping = replace(shaping, constraint=await asyncio.to_thread(self._constraint, request.grammar))
        if self._num_requests >= MAX_REQUESTS:
            raise CapacityError(f"the engine has {MAX_REQUESTS} requests already.", "Ask again later.")
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        sequence = Sequence(
            request,
            lambda completion: _answer(done, completion),
            on_token,
            shaping.shaper(),
            self._adapters[adapter] if adapter else None,
        )
        self._num_requests += 1
        try:
            return await self._post(lambda: self._batcher.waiting.append(sequence), done)
        finally:
            self._num_requests -= 1
            if done.cancelled():
                sequence.cancelled = True
                self._inbox.put(lambda: None)  # an idle engine has to look to see it

    def _constraint(self, grammar: Grammar) -> Constraint:
        return self.grammars.constraint(grammar)

    async def _post(self, action: Callable[[], None], done: asyncio.Future[T]) -> T:
        """Have the engine's thread do something, and wait until it has answered."""
        self._pending.add(done)
        try:
            self._raise_if_dead()  # after it is among those whom a thread that dies answers
            self._inbox.put(action)
            return await done
        finally:
            self._pending.discard(done)

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise ModelError(f"the engine has stopped: {self._failure!r}.", "Restart it.") from self._failure
        if self._closed:
            raise ModelError("the engine is closed.")

    def _answer_all(self, result: object) -> None:
        for future in list(self._pending):
            _answer(future, result)

    def _run(self, threads: int) -> None:
        """The engine's thread: take what came in, do a step, repeat; sleep in the inbox when idle."""
        torch.set_num_threads(threads)
        try:
            working = False
            while True:
                while True:
                    try:
                        action = self._inbox.get(block=not working)
                    except queue.Empty:
                        break
                    if action is None:
                        self._batcher.cancel_all()
                        return
                    action()
                    working = True
                started = time.monotonic()
                working = self._step()
                self._busy_s += time.monotonic() - started
        except BaseException as error:  # survives to be told to every caller, then ends the thread
            self._failure = error
            self._answer_all(ModelError(f"the engine failed: {error!r}."))
            raise

    def _step(self) -> bool:
        return self._batcher.step()


def _answer(future: asyncio.Future[Any], result: object) -> None:
    """Settle a future of another thread's loop."""
    with suppress(RuntimeError):  # that loop is closed, and with it went whoever waited
        future.get_loop().call_soon_threadsafe(_settle, future, result)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; anything else is taken at its word.

    Raises:
        ModelError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device '{name}' was asked for, but torch sees no CUDA device.", 'Use device = "cpu".')
    return torch.device(name)
