"""What is known of a pipeline's stages, as the planner is told it, and what each stage is told of the plan. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.planning.partition import Partition, StageNode
from shoal.protocol.stage import Assignment, StageOffer
from shoal.protocol.status import NodeStatus, NodeView, RunStatus, clipped

NOISE = 1.5
"""Speeds that differ by less are taken for the same: they are measured in a moment, beside whatever else runs."""

BETTER = 0.9
"""A plan replaces one that works if its cycle takes at most this part of the other's."""


@dataclass
class Peer:
    """A node that has joined. Times are monotonic seconds."""

    key: bytes
    node_id: str
    name: str
    role: str
    device: str
    joined_at: float = field(default_factory=time.monotonic)
    offer: StageOffer | None = None
    """None: it has no link, or is no stage."""
    barred_until: float = 0.0
    """It could not take layers when it was given some; until then it is given none."""

    def may_compute(self, now: float) -> bool:
        return self.offer is not None and now >= self.barred_until


Delays = Callable[[str, str], float | None]
"""One-way seconds between two nodes, by id, where that was measured."""


def known(present: Sequence[Peer], measured: Delays) -> tuple[list[StageNode], list[list[float]]]:
    """Nodes for `partition`, and one-way delays between them and to the requester.

    A delay that was not measured is that of the way by the requester.
    """
    offers = [peer.offer for peer in present if peer.offer is not None]
    assert len(offers) == len(present)
    speeds = levelled([offer.seconds_per_layer for offer in offers])
    nodes = [StageNode(p.node_id, s, o.max_layers) for p, s, o in zip(present, speeds, offers, strict=True)]
    delays = [[0.0] * (len(present) + 1) for _ in range(len(present) + 1)]
    for a, (one, offer) in enumerate(zip(present, offers, strict=True), start=1):
        delays[0][a] = delays[a][0] = offer.delay_s
        for b, (other, its) in enumerate(zip(present, offers, strict=True), start=1):
            if a != b:
                found = measured(one.node_id, other.node_id)
                delays[a][b] = offer.delay_s + its.delay_s if found is None else found
    return nodes, delays


def levelled(speeds: Sequence[float]) -> list[float]:
    """The same, with those in place of which a quicker one stands that is within `NOISE`."""
    levels: list[float] = []
    for speed in sorted(speeds):
        if not levels or speed > NOISE * levels[-1]:
            levels.append(speed)
    return [max(level for level in levels if level <= speed) for speed in speeds]


def is_better(plan: Partition, present: Partition, wanted: int) -> bool:
    """Whether it is worth the pause to put a plan in the place of one that works."""
    if len(present.stages) < wanted and len(plan.stages) > len(present.stages):
        return True
    return plan.cycle_s < BETTER * present.cycle_s


def assignments(
    plan: Partition, chosen: Sequence[Peer], epoch: int, engine: PipelineEngine, version: int
) -> list[Assignment]:
    """What each of the plan's stages is told."""
    found = []
    for place, stage in enumerate(plan.stages):
        follower = chosen[place + 1].offer if place + 1 < len(chosen) else None
        found.append(
            Assignment(
                epoch=epoch,
                stage=place,
                num_stages=len(chosen),
                first=stage.first,
                last=stage.last,
                lanes=len(engine.lanes),
                lane_slots=engine.lane_slots,
                lane_tokens=engine.lane_tokens,
                prefix_tokens=engine.lane_prefix_tokens,
                previous=chosen[place - 1].key if place else b"",
                next=follower.address if follower is not None else None,
                version=version,
            )
        )
    return found


def standing(
    run: str,
    version: int,
    requester: NodeStatus,
    peers: Iterable[Peer],
    placements: Iterable[tuple[Peer, int, int]],
) -> RunStatus:
    """A server's status: nothing is trained, so most of it is zero."""
    placed = {peer.key: f"layers {first} to {last - 1}" for peer, first, last in placements}
    return RunStatus(
        run=run,
        step=0,
        steps=0,
        published=version,
        max_staleness=0,
        most_stale=0,
        groups={},
        usd_per_hour=0.0,
        coordinator=requester,
        nodes=tuple(view(peer, placed) for peer in peers if peer.role == "stage"),
        silent=(),
        mode="serving",
    )


def view(peer: Peer, layers: Mapping[bytes, str]) -> NodeView:
    """How a stage is shown to people.

    Args:
        layers: by public key, what those of the present ring have, in words.
    """
    return NodeView(
        node_id=peer.node_id,
        name=clipped(peer.name),
        role=peer.role,
        state="active" if peer.key in layers else "idle" if peer.offer else "lost",
        why=layers.get(peer.key, "has no layers" if peer.offer else ""),
        public_key=peer.key,
        device=peer.device,
    )
