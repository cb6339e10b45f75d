"""A node that runs trials for others: it asks desks for leases, replays, signs, hands in.

Invariants: it runs only worlds and weights that it was started with, under the configuration that the desk names; what
it signs it has run; a lease that the desk has taken back is dropped at the next beat; a desk that does not answer costs
a deadline and no more, and one that answers nonsense is passed over.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.errors import NetworkError, ShoalError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.memory.leasing import IDLE_S, Answer, Beat, HandIn, Leased, TrialLease, Want, ask_desk
from shoal.memory.records import Trial
from shoal.memory.signing import sign_trial
from shoal.memory.trials import Arena
from shoal.protocol.codec import decode

log = logging.getLogger("shoal.memory")

ASK_S = 5.0
HAND_IN_S = 15.0
HAND_IN_TRIES = 4
BEATS = 3
"""Signs of life in a lease."""


class Replayer:
    """Runs trials for the desks of others until it is cancelled.

    Args:
        arenas: by family; all with the same weights.
        desks: public keys of the nodes that may have trials to run.
        most: trials at once.
    """

    def __init__(
        self, fabric: Fabric, arenas: Mapping[str, Arena], desks: Callable[[], Sequence[bytes]], *, most: int = 8
    ) -> None:
        assert len({arena.model for arena in arenas.values()}) == 1, "a replayer holds one model"
        self._fabric, self._arenas, self._desks, self._most = fabric, dict(arenas), desks, most
        self._model = next(iter(arenas.values())).model
        self.num_run = 0
        """Trials that a desk has taken."""

    async def run(self) -> None:
        """Ask and work for ever."""
        while True:
            desks = list(self._desks())
            random.shuffle(desks)
            wait_s = IDLE_S
            for desk in desks:
                try:
                    found = await self._ask(desk)
                    if found.lease is not None:
                        before = self.num_run
                        await self._work(desk, found.lease)
                        if self.num_run > before:  # or else the desk leases what cannot be run, again and again
                            wait_s = 0.0
                        break
                except ShoalError as error:  # one desk's nonsense, or a trial that cannot be run, ends no replayer
                    log.info("no trials of %s: %s", node_id_of(desk), error)
            await asyncio.sleep(wait_s)

    async def _ask(self, desk: bytes) -> Leased:
        families = {name: arena.config for name, arena in self._arenas.items()}
        want = Want(model=self._model, families=families, most=self._most)
        return decode(await ask_desk(self._fabric, desk, node_id_of(desk), "lease", want, ASK_S), Leased)

    async def _work(self, desk: bytes, lease: TrialLease) -> None:
        arena = self._arenas.get(lease.entry.family)
        if arena is None:
            raise NetworkError(f"node {node_id_of(desk)} leases trials of a family that was not offered.")
        done: list[Trial] = []

        async def one(number: int) -> None:
            try:
                done.append(await arena.run(lease.entry, lease.salt, number))
            except ShoalError as error:
                log.warning("trial %d of %s: %s", number, lease.entry.id, error)

        running = asyncio.gather(*(one(number) for number in lease.numbers))
        beating = asyncio.create_task(self._beat(desk, lease, done))
        try:
            waiting: set[asyncio.Future[Any]] = {running, beating}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beating.cancel()
            dropped = not running.done()
            running.cancel()
            await asyncio.gather(running, beating, return_exceptions=True)
        if dropped:
            log.info("the lease %s was taken back", lease.id)
            return
        running.result()
        await self._hand_in(desk, lease, done)

    async def _beat(self, desk: bytes, lease: TrialLease, done: Sequence[Trial]) -> None:
        """Say how many trials are done until the desk says that they are not wanted any more."""
        while True:
            await asyncio.sleep(lease.duration_s / BEATS)
            try:
                beat = Beat(lease=lease.id, done=len(done))
                answer = await ask_desk(self._fabric, desk, node_id_of(desk), "beat", beat, ASK_S)
                if not decode(answer, Answer).accepted:
                    return
            except NetworkError as error:
                log.info("the desk of lease %s does not answer: %s", lease.id, error)

    async def _hand_in(self, desk: bytes, lease: TrialLease, done: Sequence[Trial]) -> None:
        identity = self._fabric.identity
        signed = tuple(sign_trial(identity, lease.entry.id, trial) for trial in done)
        handed = HandIn(lease=lease.id, entry=lease.entry.id, trials=signed)
        for attempt in range(HAND_IN_TRIES):
            try:
                answer = await ask_desk(self._fabric, desk, node_id_of(desk), "hand-in", handed, HAND_IN_S)
                self.num_run += len(done) * decode(answer, Answer).accepted
                return
            except NetworkError as error:
                log.info("lease %s could not be handed in (%d): %s", lease.id, attempt + 1, error)
                await asyncio.sleep(IDLE_S)
