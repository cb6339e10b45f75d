"""Rings of real stages in one process: real links on loopback, no control room around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from engine_cases import local, reference_logits
from torch import Tensor

from shoal.engine.pipeline.hub import Hub
from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.engine.pipeline.node import StageNode
from shoal.engine.pipeline.ring import Rings, Weights
from shoal.engine.pipeline.weights import chosen
from shoal.engine.source import LocalModel
from shoal.engine.speculation.speculating import Speculation
from shoal.fabric.identity import Identity
from shoal.protocol.sampling import Completion
from shoal.protocol.stage import Assignment, LinkAddress

PATIENCE_S = 60.0


class RingOfStages:
    """A requester and its stages; layers are assigned by hand."""

    def __init__(
        self,
        directory: Path,
        lanes: int,
        patience_s: float,
        speculate: Callable[[int, int], Speculation] | None = None,
        link_s: float = 0.0,
        prefix_tokens: int = 0,
    ) -> None:
        self.link_s = link_s
        self.relays: list[asyncio.Server] = []
        self.model = local(directory)
        self.models = {0: self.model}
        self.weights: Weights | None = None
        self.rings = Rings(patience_s)
        self.identity = Identity.generate()
        self.lost: list[bytes] = []
        self.hub = Hub(self.identity, lambda key: key in self.nodes, self._on_lost)
        self.home: LinkAddress
        self.nodes: dict[bytes, StageNode] = {}
        self.addresses: dict[bytes, LinkAddress] = {}
        self.tasks: dict[bytes, asyncio.Task[None]] = {}
        self.epoch = 0
        self.loaded: list[set[str]] = []
        self.engine = PipelineEngine(
            self.model, self.rings, dtype="fp32", lanes=lanes, threads=1,
            max_sequences=16, cache_tokens=4096, context_tokens=256, prefill_tokens=64, speculate=speculate,
            prefix_tokens=prefix_tokens,
        )  # fmt: skip

    def _on_lost(self, key: bytes, why: str) -> None:
        self.lost.append(key)
        self.rings.close(why)

    async def add(self) -> bytes:
        """One more stage, without layers yet."""
        identity = Identity.generate()

        async def tensors(shapes: Mapping[str, tuple[int, ...]], version: int) -> Mapping[str, Tensor]:
            self.loaded.append(set(shapes))
            return chosen(self.models[version], shapes)

        node = StageNode(
            identity, self.model.config(), torch.float32, torch.device("cpu"), threads=1, tensors=tensors,
            allow=lambda key: key in self.nodes,
        )  # fmt: skip
        key = identity.public_key
        self.nodes[key] = node
        self.addresses[key] = await self.slowed(await node.listen("127.0.0.1"))
        self.tasks[key] = asyncio.create_task(node.run(await self.slowed(self.home)))
        assert await self.hub.linked(key, PATIENCE_S)
        return key

    async def slowed(self, address: LinkAddress) -> LinkAddress:
        """The same, behind a relay that delivers every byte `link_s` later."""
        if not self.link_s:
            return address
        loop = asyncio.get_running_loop()

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    loop.call_later(self.link_s, writer.write, data)
            loop.call_later(self.link_s, writer.close)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(address.host, address.port)
            await asyncio.gather(carry(reader, back), carry(there, writer))

        relay = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.relays.append(relay)
        return msgspec.structs.replace(address, port=relay.sockets[0].getsockname()[1])

    async def assign(self, keys: Sequence[bytes], cuts: Sequence[int]) -> None:
        """Layers between the cuts to these stages, and open the ring."""
        self.epoch += 1
        self.rings.close("layers are assigned anew.")
        edges = [0, *cuts, self.engine.num_layers]
        for place, key in enumerate(keys):
            last = place == len(keys) - 1
            await self.nodes[key].assign(
                Assignment(
                    epoch=self.epoch,
                    stage=place,
                    num_stages=len(keys),
                    first=edges[place],
                    last=edges[place + 1],
                    lanes=len(self.engine.lanes),
                    lane_slots=self.engine.lane_slots,
                    lane_tokens=self.engine.lane_tokens,
                    prefix_tokens=self.engine.lane_prefix_tokens,
                    previous=keys[place - 1] if place else b"",
                    next=None if last else self.addresses[keys[place + 1]],
                    version=self.weights.version if self.weights is not None else 0,
                )
            )
        self.rings.open(self.hub.ring(self.epoch, keys, lambda: None, self.weights))

    async def change(self, model: LocalModel, cuts: Sequence[int]) -> None:
        """Other weights for all, fetched ahead of their epoch."""
        version = max(self.models) + 1
        self.models[version] = model
        weights = self.engine.make_weights(version, model.tensors())
        for node in self.nodes.values():
            await node.prepare(version)
        fetched = len(self.loaded)
        self.weights = weights
        await self.assign(list(self.nodes), cuts)
        assert len(self.loaded) == fetched, "nothing is fetched while nobody computes"

    async def kill(self, key: bytes) -> None:
        """As if its process were gone."""
        self.tasks[key].cancel()
        await asyncio.gather(self.tasks[key], return_exceptions=True)
        await self.nodes.pop(key).close()


@asynccontextmanager
async def ring_of(
    directory: Path,
    cuts: Sequence[int],
    *,
    lanes: int = 1,
    patience_s: float = PATIENCE_S,
    speculate: Callable[[int, int], Speculation] | None = None,
    link_s: float = 0.0,
    prefix_tokens: int = 0,
) -> AsyncIterator[RingOfStages]:
    """A ring whose layers are cut there, ready; each of its links takes `link_s`."""
    ring = RingOfStages(directory, lanes, patience_s, speculate, link_s, prefix_tokens)
    ring.home = await ring.hub.start("127.0.0.1")
    try:
        keys = [await ring.add() for _ in range(len(cuts) + 1)]
        await ring.assign(keys, cuts)
        yield ring
    finally:
        await ring.engine.close()
        for key in list(ring.nodes):
            await ring.kill(key)
        await ring.hub.close()
        for relay in ring.relays:
            relay.close()


def assert_greedy_under_its_version(
    references: Mapping[int, Any], prompt: Sequence[int], completion: Completion
) -> None:
    """Each token is the likeliest under the weights that it names, up to near-ties, and versions only rise."""
    assert list(completion.versions) == sorted(completion.versions)
    for at, (token, version) in enumerate(zip(completion.token_ids, completion.versions, strict=True)):
        logits = reference_logits(references[version], [*prompt, *completion.token_ids[:at]])[-1]
        assert float(logits.max() - logits[token]) < 1e-3, f"token {at} is not version {version}'s"
