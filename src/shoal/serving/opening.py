"""What a server's settings ask for, opened: the engine, its adapters, the embedding model; and their end.

Invariant: what would not fit this machine's free memory is refused before anything is loaded, with both numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from shoal.config import Serving
from shoal.engine.embedding import Embedder
from shoal.engine.local import LocalEngine, pick_device
from shoal.engine.model import Architecture, weight_bytes
from shoal.engine.source import LocalModel
from shoal.errors import CapacityError, ConfigError
from shoal.serving.api import Api
from shoal.serving.notes import Notes
from shoal.serving.pipeline import serving_over
from shoal.serving.speculation import speculations
from shoal.serving.stage_host import free_bytes


@asynccontextmanager
async def opened(
    model: LocalModel,
    name: str,
    settings: Serving,
    embedding: LocalModel | None = None,
    draft: LocalModel | None = None,
) -> AsyncIterator[tuple[Api, str]]:
    """The API of a model, and the ticket with which stages join, empty where there are none.

    Args:
        draft: the drafter that the settings name, where it has weights.

    Raises:
        ConfigError: the settings don't go together.
        CapacityError: weights and caches would not fit the memory that is free.
        ModelError: a checkpoint or an adapter can't be used.
    """
    adapters = adapter_folders(settings)
    speculate = await asyncio.to_thread(speculations, model, settings, draft)
    async with AsyncExitStack() as stack:
        ticket = ""
        if settings.stages:
            over = await stack.enter_async_context(serving_over(model, name, settings, speculate))
            api, ticket = Api(over.engine, name, settings), over.ticket
        else:
            check_memory(model, settings)
            engine = await asyncio.to_thread(
                LocalEngine,
                model,
                dtype=settings.dtype,
                device=settings.device,
                threads=settings.threads,
                max_sequences=settings.max_sequences,
                cache_tokens=settings.cache_tokens,
                context_tokens=settings.context_tokens,
                prefill_tokens=settings.prefill_tokens,
                prefix_tokens=settings.prefix_tokens,
                int8=settings.weights == "int8",
                adapters=adapters,
                speculation=speculate(settings.max_sequences, settings.cache_tokens) if speculate else None,
            )
            api = Api(engine, name, settings, adapters=engine.adapters)
        if embedding is not None:
            device = str(pick_device(settings.device))
            embedder = await asyncio.to_thread(Embedder, embedding, device=device, threads=settings.threads)
            api.embedder = await stack.enter_async_context(embedder)
            api.embedding_model = settings.embedding_model
        if settings.memory:
            api.notes = Notes(Path(settings.memory), api.engine.tokenizer, settings.memory_tokens)
            stack.callback(api.notes.close)
        yield api, ticket


def adapter_folders(settings: Serving) -> dict[str, Path]:
    """The adapters' names and folders.

    Raises:
        ConfigError: one is not NAME=FOLDER, two have one name, or there are stages.
    """
    found: dict[str, Path] = {}
    for given in settings.adapters:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder) or ":" in name or name in found:
            raise ConfigError(f"'{given}' is no adapter with a name of its own.", "Give NAME=FOLDER.")
        found[name] = Path(folder).expanduser()
    if settings.stages and (found or settings.weights != "full"):
        raise ConfigError(
            "adapters and weights of 8 bits are not served over stages.", "Leave out --stages, or merge the adapter."
        )
    return found


def check_memory(model: LocalModel, settings: Serving) -> None:
    """Refuse what can't fit; on a GPU, its own allocator does."""
    if pick_device(settings.device).type != "cpu":
        return
    config = model.config()
    arch = Architecture.from_config(config)
    item = 2 if settings.dtype == "bf16" else 4
    token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * item
    cache = (settings.cache_tokens + settings.prefix_tokens) * token_bytes
    weights = weight_bytes(config, item, int8=settings.weights == "int8")
    free = free_bytes()
    if weights + cache > free:
        tokens = max(0, free - weights) // token_bytes
        raise CapacityError(
            f"the weights take {weights / 2**20:.0f} MiB and {settings.cache_tokens} cached tokens with "
            f"{settings.prefix_tokens} of prefixes {cache / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free.",
            f"Lower serving.cache_tokens and serving.prefix_tokens to {tokens} together."
            if tokens > settings.context_tokens
            else "Use a smaller model, --weights int8, or more machines with --stages.",
        )
