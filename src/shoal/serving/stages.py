"""The stages of a pipeline, from the requester's side: who has joined, which layers each has, and what when one goes.

    run/join ──▶ grant ──▶ home link ──▶ pipeline/offer ──▶ plan ──▶ node/ID/assign ──▶ ring opens
                                                             ▲
          a link ends ──▶ ring closes: lanes wait ───────────┘        lanes compute their rows again, and go on

Invariants: a ring is opened only when every stage of it has said that it is ready for its epoch; a stage whose link
ends is out of the plan before the next one is made; layers move while requests are under way only if stages were lost,
or if a newcomer makes a token's cycle shorter by a tenth or brings the number that was asked for; all stages of a ring
have weights of the same version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from shoal.broadcast.tensors import TensorView
from shoal.coordinator.admission import Admission
from shoal.engine.pipeline.hub import Hub
from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.engine.pipeline.ring import Rings, Weights
from shoal.engine.pipeline.weights import Shelf
from shoal.engine.weights import from_views
from shoal.errors import CapacityError, ModelError, RecordError, ShoalError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.fabric import Fabric
from shoal.fabric.join import REASONS, read_join_request
from shoal.fabric.service import Request
from shoal.planning.partition import Partition, measured, partition
from shoal.protocol.codec import decode, encode
from shoal.protocol.node import JoinReply
from shoal.protocol.stage import (
    MAX_STAGES,
    LinkAddress,
    StageOffer,
    StageSpec,
    TensorRequest,
)
from shoal.protocol.status import RunStatus
from shoal.protocol.work import Ack
from shoal.serving.layers import Peer, assignments, is_better, known, standing
from shoal.serving.stage_calls import LOAD_S, SMALL_BYTES, assign, delays, prepare
from shoal.swarm.member import Member, profile

log = logging.getLogger("shoal.pipeline")

LINK_S = 10.0
"""A stage that makes an offer has its home link by then."""

START_S = 60.0
"""How long the first plan waits for the number of stages that was asked for."""

REVIEW_S = 10.0
"""The plan is looked at again this often: a stage that was left out may be let in again."""

BARRED_S = 60.0
"""A stage that could not take its layers is left out for so long."""

MAX_PEERS = 1024
"""When so many have joined, those that have no link are forgotten."""


class Stages:
    """`async with Stages(…) as stages:` and its engine's rings open as soon as there are enough stages.

    Args:
        wanted: stages to wait for at the beginning, and to use as long as there are so many.
        model_name: for people.
    """

    def __init__(
        self,
        fabric: Fabric,
        admission: Admission,
        run: str,
        engine: PipelineEngine,
        rings: Rings,
        shelf: Shelf,
        *,
        config: bytes,
        dtype: str,
        model_name: str,
        wanted: int,
        host: str,
    ) -> None:
        self._fabric = fabric
        self._admission = admission
        self._run = run
        self._engine, self._rings, self._shelf = engine, rings, shelf
        self._config, self._dtype, self._model_name = config, dtype, model_name
        self._wanted, self._host = wanted, host
        self._hub = Hub(fabric.identity, self._may_compute, self._lost)
        self._home: LinkAddress
        self._member: Member
        self._desk = Desk(fabric, "requester", "coordinator", self._account, self._is_granted)
        self._stack = AsyncExitStack()
        self._planner: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._membership = asyncio.Event()
        """Set when a stage is lost, for an assignment that waits for it."""
        self._peers: dict[bytes, Peer] = {}
        self._delays: dict[frozenset[str], float] = {}
        """One way between two stages, by their ids; the newest last."""
        self._introducing = asyncio.Lock()
        self._epoch = 0
        self._weights: Weights | None = None
        """In the place of those that the server began with."""
        self._changing = asyncio.Lock()
        self._changed = asyncio.Condition()
        """Notified when a ring opens."""
        engine.changes = self.change
        self._plan: Partition | None = None
        self._keys: tuple[bytes, ...] = ()
        """Stages of the present ring, in order."""
        self.opened = asyncio.Event()
        """There has been a ring."""
        self._ending = False
        self._started_at = time.monotonic()
        self._closed_at = self._started_at
        self.pauses_s: list[float] = []
        """How long there was no ring, each time but the first; the newest last."""

    # Life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            own = profile(self._fabric, self._run, (), name="requester")
            root = self._fabric.identity.public_key
            member = Member(self._fabric, self._run, root, own, grants=self._admission.grants)
            self._member = await stack.enter_async_context(member)
            self._home = await self._hub.start(self._host)
            stack.push_async_callback(self._hub.close)
            await stack.enter_async_context(self._desk)
            serve, stage = self._fabric.serve, self._may_compute
            await serve("run/join", self._join, max_bytes=SMALL_BYTES)
            await serve("run/leave", self._leave, max_bytes=SMALL_BYTES, allow=self._is_granted)
            await serve("run/status", self._tell, max_bytes=SMALL_BYTES, allow=self._is_granted)
            await serve("pipeline/offer", self._offered, max_bytes=SMALL_BYTES, allow=stage)
            await serve("pipeline/tensor", self._tensor, max_bytes=SMALL_BYTES, allow=stage)
            self._stack = stack.pop_all()
        self._started_at = time.monotonic()
        self._planner = asyncio.create_task(self._plan_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._planner is not None:
            self._planner.cancel()
            await asyncio.gather(self._planner, return_exceptions=True)
        self.ends()
        await self._stack.aclose()

    def ends(self) -> None:
        """Stages that go from now on go because they are told to."""
        self._ending = True
        self._rings.close("the server is ending.", final=True)

    @property
    def placements(self) -> list[tuple[Peer, int, int]]:
        """Who has which layers now."""
        if self._plan is None:
            return []
        placed = zip(self._keys, self._plan.stages, strict=True)
        return [(self._peers[key], stage.first, stage.last) for key, stage in placed if key in self._peers]

    # Who is there

    def _is_granted(self, key: bytes) -> bool:
        return self._member.is_granted(key)

    def _may_compute(self, key: bytes) -> bool:
        return "stage" in self._admission.grants.roles(key, time.time())

    async def _join(self, request: Request) -> bytes:
        asked = read_join_request(request.body)
        code = asked if isinstance(asked, str) else self._admission.admit(asked, request.sender_key, time.time())
        if code is not None or isinstance(asked, str):
            assert code is not None
            return encode(JoinReply(accepted=False, code=code, reason=REASONS[code]))
        if len(self._peers) >= MAX_PEERS:
            self._peers = {key: peer for key, peer in self._peers.items() if peer.offer is not None}
        known_peer = self._peers.get(asked.public_key)
        if known_peer is not None and not asked.renews:
            self._lost(asked.public_key, "it was started again.")
            self._hub.drop(asked.public_key)
        if known_peer is None or not asked.renews:
            self._peers[asked.public_key] = Peer(asked.public_key, request.sender, asked.name, asked.role, asked.device)
        spec = StageSpec(
            model=self._model_name,
            config=self._config,
            dtype="fp32" if self._dtype == "fp32" else "bf16",
            cache_tokens=(self._engine.lane_tokens + self._engine.lane_prefix_tokens) * len(self._engine.lanes),
            home=self._home,
        )
        now = time.time()
        reply = JoinReply(
            accepted=True,
            node_id=request.sender,
            learner_key=self._admission.learner_key,
            spec=encode(spec),
            grants=self._admission.grants_for(request.sender_key, now),
            revocations=self._admission.grants.revocations,
        )
        return encode(reply)

    async def _leave(self, request: Request) -> bytes:
        if request.sender_key in self._keys:
            # At once, and not when its link has ended: the plan must name nobody who is not here.
            self._lost(request.sender_key, "it has left.")
        self._peers.pop(request.sender_key, None)
        self._hub.drop(request.sender_key)
        return encode(Ack())

    async def _offered(self, request: Request) -> bytes:
        offer = decode(request.body, StageOffer, max_bytes=SMALL_BYTES)
        peer = self._peers.get(request.sender_key)
        if peer is None or offer.address.public_key != request.sender_key:
            raise RecordError("an offer of a node that has not joined, or in another's name.")
        if not await self._hub.linked(request.sender_key, LINK_S):
            raise RecordError("an offer of a stage without a link.")
        async with self._introducing:  # so that of any two stages one finds the other here
            await self._measure(peer)
            peer.offer = offer
        log.info("stage %s: up to %d layers, %.2f ms each", peer.name, offer.max_layers, 1000 * offer.seconds_per_layer)
        self._wake.set()
        return encode(Ack())

    async def _measure(self, peer: Peer) -> None:
        """Have a stage find out how far it is to the others; where it can't, steps would go by this node."""
        others = [other for other in self._peers.values() if other.offer is not None and other is not peer]
        others = others[-MAX_STAGES:]
        if not others:
            return
        for other, delay_s in zip(others, await delays(self._fabric, peer, others), strict=False):
            if delay_s >= 0:
                self._delays[frozenset((peer.node_id, other.node_id))] = delay_s
        while len(self._delays) > MAX_PEERS:
            del self._delays[next(iter(self._delays))]

    async def _tensor(self, request: Request) -> bytes:
        return encode(self._shelf.piece(decode(request.body, TensorRequest, max_bytes=SMALL_BYTES)))

    def _lost(self, key: bytes, why: str) -> None:
        peer = self._peers.get(key)
        if peer is not None:
            peer.offer = None
            log.log(logging.INFO if self._ending else logging.WARNING, "stage %s is lost: %s", peer.name, why)
        if key in self._keys:
            self._close(f"stage {peer.name if peer else '?'} is lost: {why}")
        self._membership.set()
        self._wake.set()

    # Who does what

    async def _plan_forever(self) -> None:
        while True:
            left_s = self._started_at + START_S - time.monotonic()
            with contextlib.suppress(TimeoutError):  # those that are there have to do; or delays are known by now
                async with asyncio.timeout(left_s if self._epoch == 0 and left_s > 0 else REVIEW_S):
                    await self._wake.wait()
            self._wake.clear()
            if not self._ending:
                await self._settle()

    async def _settle(self) -> None:
        """Give the layers to those who are there."""
        while True:
            present = [peer for peer in self._peers.values() if peer.may_compute(time.monotonic())]
            late = time.monotonic() - self._started_at >= START_S
            if self._epoch == 0 and len(present) < self._wanted and not late:
                return
            nodes, delays = known(present, lambda one, other: self._delays.get(frozenset((one, other))))
            lanes, least = len(self._engine.lanes), min(self._wanted, len(present))
            if self._plan is not None and self._is_outdated:  # layers stay where they are: their weights are there
                if await self._assign(self._plan, {peer.node_id: peer for peer in self._peers.values()}):
                    return
                continue
            try:
                plan = partition(self._engine.num_layers, nodes, delays, in_flight=lanes, min_stages=least)
            except CapacityError as error:
                if self._plan is None:
                    self._rings.close(f"{error.problem}")
                return
            if self._plan is not None:
                now = measured(self._plan, nodes, delays, in_flight=lanes)
                if not is_better(plan, now, self._wanted):
                    return
            if await self._assign(plan, {peer.node_id: peer for peer in present}):
                return

    @property
    def _is_outdated(self) -> bool:
        """Whether the present ring's stages have other weights than they should."""
        return self._weights is not None and self._engine.version != self._weights.version

    async def _assign(self, plan: Partition, peers: dict[str, Peer]) -> bool:
        """Whether all took their layers, so that the ring is open."""
        self._close("layers are being assigned.")
        self._epoch += 1
        self._membership.clear()
        chosen = [peers[stage.node] for stage in plan.stages]
        weights = self._weights
        parts = assignments(plan, chosen, self._epoch, self._engine, weights.version if weights is not None else 0)
        told: list[asyncio.Task[ShoalError | None]] = [
            asyncio.create_task(assign(self._fabric, peer, part)) for peer, part in zip(chosen, parts, strict=True)
        ]
        lost: asyncio.Task[bool] = asyncio.create_task(self._membership.wait())
        try:
            while not lost.done() and not all(task.done() for task in told):
                waiting = {task for task in told if not task.done()}
                await asyncio.wait([*waiting, lost], return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                return False
        finally:
            for task in (*told, lost):
                task.cancel()
            await asyncio.gather(*told, lost, return_exceptions=True)
        failed = [
            (peer, error) for peer, task in zip(chosen, told, strict=True) if (error := task.result()) is not None
        ]
        for peer, error in failed:
            log.warning("stage %s did not take its layers: %s", peer.name, error)
            peer.barred_until = time.monotonic() + BARRED_S
        if failed or any(peer.offer is None for peer in chosen):
            return False
        self._plan, self._keys = plan, tuple(peer.key for peer in chosen)
        self._rings.open(self._hub.ring(self._epoch, self._keys, self._late, weights))
        self.opened.set()
        async with self._changed:
            self._changed.notify_all()
        if self._epoch > 1:
            self.pauses_s = [*self.pauses_s[-99:], time.monotonic() - self._closed_at]
        layers = ", ".join(
            f"{peer.name}: {s.first} to {s.last - 1}" for peer, s in zip(chosen, plan.stages, strict=True)
        )
        log.info("epoch %d: layers %s", self._epoch, layers)
        return True

    def _close(self, why: str) -> None:
        if self._plan is not None:
            self._closed_at = time.monotonic()
        self._plan, self._keys = None, ()
        self._rings.close(why)

    def _late(self) -> None:
        """A step never came back: begin anew with those who answer."""
        self._close("a step never came back.")
        self._wake.set()

    # Which weights

    async def change(self, version: int, views: Mapping[str, TensorView]) -> float:
        """Other weights on all stages, in a new epoch; gives the seconds without a ring.

        Raises:
            ModelError: they are not this model's; or no ring opened with them for long, which it may yet.
        """
        async with self._changing:
            if self._weights is not None and version == self._weights.version:
                return 0.0
            weights = await asyncio.to_thread(self._engine.make_weights, version, from_views(views))
            self._shelf.put(version, views)
            # Stages fetch what they need while they still compute with what they have.
            await asyncio.gather(*(prepare(self._fabric, peer, version) for peer, _, _ in self.placements))
            self._weights = weights
            self._wake.set()
            try:
                async with asyncio.timeout(LOAD_S), self._changed:
                    await self._changed.wait_for(lambda: self._engine.version == version)
            except TimeoutError:
                raise ModelError(f"the stages did not go over to version {version} within {LOAD_S:.0f} s.") from None
            self._shelf.keep(version)
            return self.pauses_s[-1] if self.pauses_s else 0.0

    # What people are told

    def _account(self) -> Account:
        doing = f"serves {self._model_name} over {len(self._keys)} stages" if self._plan else self._rings.trouble
        return Account(doing=doing or "assigns layers", counters={"epochs": self._epoch})

    async def _tell(self, request: Request) -> bytes:
        return encode(self.status())

    def status(self) -> RunStatus:
        """Who is there and has which layers."""
        return standing(self._run, self._engine.version, self._desk.status(), self._peers.values(), self.placements)
