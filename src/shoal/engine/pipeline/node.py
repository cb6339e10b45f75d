"""A stage's process: takes steps from its links, computes them one after another, passes them on.

    link of the stage before ──┐                                     ┌──▶ link to the next stage
    home link ─────────────────┴──▶ steps ──▶ compute (a thread) ──▶ results ──▶ or home, which forwards

The home link goes to the requester, dialled by the stage, so it is there wherever the stage is. It carries the first
stage's input, the last stage's output, and between two stages what cannot go directly.

Invariants: steps come from the requester or the stage before, and are computed in order; one of another epoch is
dropped, and so is one that a later one says nobody waits for; `assign` returns when this stage is ready for its epoch;
without its home link a stage ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.broadcast.link import Address, dial
from shoal.engine.pipeline.links import LinkPort, StepLink
from shoal.engine.pipeline.stage import Stage
from shoal.errors import ModelError, NetworkError, RecordError
from shoal.fabric.identity import Identity
from shoal.protocol.codec import encode
from shoal.protocol.stage import MAX_IN_FLIGHT, MAX_LANES, Assigned, Assignment, LinkAddress, Step

log = logging.getLogger("shoal.pipeline")

Tensors = Callable[[Mapping[str, tuple[int, ...]], int], Awaitable[Mapping[str, Tensor]]]
"""Fetches the tensors of these names and shapes, of a version."""


class StageNode:
    """One stage of one requester's pipeline.

    Args:
        config: the model's `transformers` configuration.
        tensors: where weights come from.
        allow: takes the public key of who wants to link to this node.
    """

    def __init__(
        self,
        identity: Identity,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        threads: int,
        tensors: Tensors,
        allow: Callable[[bytes], bool],
    ) -> None:
        self._identity = identity
        self._config, self._dtype, self._device = config, dtype, device
        self._tensors = tensors
        self._port = LinkPort(identity, self._taken, allow)
        self._thread = ThreadPoolExecutor(1, "shoal-stage", torch.set_num_threads, (threads,))
        self._steps: asyncio.Queue[tuple[Step, bytes]] = asyncio.Queue(MAX_IN_FLIGHT * MAX_LANES)
        self._results: asyncio.Queue[tuple[Step, bytes]] = asyncio.Queue(MAX_IN_FLIGHT * MAX_LANES)
        self._void: deque[tuple[int, int]] = deque(maxlen=MAX_IN_FLIGHT * MAX_LANES)
        """Lane and number of steps that need not be computed."""
        self.num_dropped = 0
        self._stage: Stage | None = None
        self._prepared: tuple[int, tuple[int, int], Mapping[str, Tensor]] | None = None
        """Version, layers and tensors that wait for their epoch."""
        self._home: StepLink | None = None
        self._next: StepLink | None = None
        self._next_task: asyncio.Task[None] | None = None
        self._assigning = asyncio.Lock()
        self.num_steps = 0
        self.busy_s = 0.0

    @property
    def assignment(self) -> Assignment | None:
        """The present one; none yet."""
        return self._stage.assignment if self._stage else None

    async def listen(self, host: str) -> LinkAddress:
        """Take links of stages before this one; gives where."""
        return await self._port.start(host)

    async def run(self, home: LinkAddress) -> None:
        """Serve until the requester is gone.

        Raises:
            NetworkError: it is, or cannot be reached.
        """
        self._home = StepLink(await dial(self._identity, Address(home.host, home.port, home.public_key)))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._home.run(self._take))
                group.create_task(self._compute())
                group.create_task(self._pass_on())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def close(self) -> None:
        """Let go of links and thread."""
        await self._port.close()
        await self._unlink()
        if self._home is not None:
            self._home.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def assign(self, assignment: Assignment) -> Assigned:
        """Take these layers, and be ready.

        Raises:
            RecordError: the model does not have them.
            ModelError, NetworkError: their weights are not to be had.
        """
        async with self._assigning:
            started = time.monotonic()
            old, loaded = self._stage, 0
            layers = (assignment.first, assignment.last)
            if old is not None and assignment.epoch <= old.assignment.epoch:
                raise RecordError(f"epoch {assignment.epoch} is over.")
            await self._unlink()
            if old is not None and (old.assignment.first, old.assignment.last) == layers:
                if assignment.version != old.assignment.version:
                    found = await self._weights(old, assignment.version)
                    await self._in_thread(old.load, found)
                    loaded = len(found)
                await self._in_thread(old.renew, assignment)
            else:
                self._stage = None  # its memory is needed
                del old
                stage = await self._in_thread(Stage, self._config, self._dtype, self._device, assignment)
                found = await self._weights(stage, assignment.version)
                await self._in_thread(stage.load, found)
                self._stage, loaded = stage, len(found)
            if assignment.next is not None:
                await self._link_to(assignment.next)
            return Assigned(epoch=assignment.epoch, loaded_tensors=loaded, seconds=time.monotonic() - started)

    async def prepare(self, version: int) -> None:
        """Fetch these weights of the present layers, while the present ones are computed with.

        Raises:
            RecordError, NetworkError: they are not to be had.
        """
        stage = self._stage
        if stage is None or stage.assignment.version == version:
            return
        found = await self._tensors(stage.decoder.shapes, version)
        self._prepared = version, (stage.assignment.first, stage.assignment.last), found

    async def _weights(self, stage: Stage, version: int) -> Mapping[str, Tensor]:
        layers = (stage.assignment.first, stage.assignment.last)
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[:2] == (version, layers):
            return prepared[2]
        return await self._tensors(stage.decoder.shapes, version)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def _link_to(self, address: LinkAddress) -> None:
        try:
            self._next = StepLink(await dial(self._identity, Address(address.host, address.port, address.public_key)))
        except NetworkError as error:
            log.warning("no direct link to the next stage, so steps go by the requester: %s", error.problem)
            return
        self._next_task = asyncio.create_task(self._follow(self._next))

    async def _follow(self, link: StepLink) -> None:
        try:
            await link.run(self._take)
        except (NetworkError, RecordError) as error:
            log.info("the link to the next stage ended: %s", error.problem)
        if self._next is link:
            self._next = None

    async def _unlink(self) -> None:
        task, self._next, self._next_task = self._next_task, None, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _taken(self, link: StepLink) -> None:
        async def take(step: Step, data: bytes) -> None:
            if self.assignment is None or link.peer != self.assignment.previous:
                raise RecordError("a step came from a node that is not before this one.")
            await self._take(step, data)

        await link.run(take)

    async def _take(self, step: Step, data: bytes) -> None:
        if self._steps.full():
            raise RecordError("more steps are under way than there are lanes.")
        self._void.extend((step.lane, number) for number in step.voids)
        self._steps.put_nowait((step, data))

    async def _compute(self) -> None:
        while True:
            step, data = await self._steps.get()
            stage = self._stage
            if stage is None or step.epoch != stage.assignment.epoch:
                continue
            if (step.lane, step.number) in self._void:
                self.num_dropped += 1
                continue
            try:
                result = await self._in_thread(stage.compute, step, data)
            except (RecordError, ModelError, RuntimeError) as error:  # torch tells of too little memory so
                log.warning("a step could not be computed: %s", error)
                ended = stage.assignment.num_stages
                result = msgspec.structs.replace(step, stage=ended, ops=(), failure=str(error)[:1000]), b""
            else:
                self.num_steps += 1
                self.busy_s += result[0].busy_s[-1]
            await self._results.put(result)

    async def _pass_on(self) -> None:
        while True:
            step, data = await self._results.get()
            header = encode(step)
            if self._next is not None and not step.failure:
                try:
                    await self._next.send(header, data)
                    continue
                except NetworkError as error:
                    log.info("a step goes by the requester: %s", error.problem)
                    self._next = None
            assert self._home is not None
            await self._home.send(header, data)
