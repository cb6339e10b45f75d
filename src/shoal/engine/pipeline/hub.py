"""The requester's end of every link: sends steps into the ring, takes results, forwards what has no direct way.

Invariants: a stage has one home link, its newest; when that ends, `on_lost` is told, once; steps are taken only from
stages of the present ring, and only for its epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from shoal.engine.pipeline.links import LinkPort, StepLink
from shoal.engine.pipeline.ring import Ring, Weights
from shoal.errors import NetworkError, RecordError
from shoal.fabric.identity import Identity
from shoal.protocol.codec import encode
from shoal.protocol.stage import LinkAddress, Step

log = logging.getLogger("shoal.pipeline")


class Hub:
    """All home links.

    Args:
        allow: takes a stage's public key.
        on_lost: takes the key of a stage whose home link has ended, and why.
    """

    def __init__(
        self, identity: Identity, allow: Callable[[bytes], bool], on_lost: Callable[[bytes, str], None]
    ) -> None:
        self._port = LinkPort(identity, self._serve, allow)
        self._on_lost = on_lost
        self._homes: dict[bytes, StepLink] = {}
        self._changed = asyncio.Condition()
        self._ring: Ring | None = None
        self._keys: Sequence[bytes] = ()

    async def start(self, host: str) -> LinkAddress:
        """Take links; gives where."""
        return await self._port.start(host)

    async def close(self) -> None:
        await self._port.close()

    async def linked(self, key: bytes, patience_s: float) -> bool:
        """Whether the stage has its home link, after at most so long."""
        try:
            async with asyncio.timeout(patience_s), self._changed:
                await self._changed.wait_for(lambda: key in self._homes)
        except TimeoutError:
            return False
        return True

    def ring(
        self, epoch: int, keys: Sequence[bytes], on_late: Callable[[], None], weights: Weights | None = None
    ) -> Ring:
        """A new ring of these stages, in the order of the layers; the one before is used no more."""

        async def send(header: bytes, data: bytes) -> None:
            await self._send(keys[0], header, data)

        self._keys = tuple(keys)
        self._ring = Ring(asyncio.get_running_loop(), epoch, len(keys), send, on_late, weights)
        return self._ring

    def drop(self, key: bytes) -> None:
        """End a stage's home link."""
        if (link := self._homes.get(key)) is not None:
            link.close()

    async def _send(self, key: bytes, header: bytes, data: bytes) -> None:
        link = self._homes.get(key)
        if link is None:
            raise NetworkError("a stage has no link.")
        await link.send(header, data)

    async def _serve(self, link: StepLink) -> None:
        if (old := self._homes.get(link.peer)) is not None:
            old.close()
        async with self._changed:
            self._homes[link.peer] = link
            self._changed.notify_all()
        why = "its link was closed."

        async def take(step: Step, data: bytes) -> None:
            await self._take(link.peer, step, data)

        try:
            await link.run(take)
        except (NetworkError, RecordError) as error:
            why = error.problem
        finally:
            if self._homes.get(link.peer) is link:
                del self._homes[link.peer]
                self._on_lost(link.peer, why)

    async def _take(self, sender: bytes, step: Step, data: bytes) -> None:
        ring = self._ring
        if ring is None or step.epoch != ring.epoch or sender not in self._keys:
            return
        if step.stage == ring.num_stages:
            ring.arrived(step, data)
        elif step.stage < ring.num_stages:
            try:
                await self._send(self._keys[step.stage], encode(step), data)
            except NetworkError as error:
                log.info("a step could not be forwarded: %s", error.problem)  # its stage is lost, as `on_lost` hears
