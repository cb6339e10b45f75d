"""Who takes part in spreading a version: the source's book of nodes, and a node's view of one list from it.

The book gives everybody the same list for the same version, so that all make the same plan; a node that turns up
later finds itself on the next version's. Pure: time is an argument. Bounded in nodes and versions.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from itertools import islice

from msgspec.structs import replace

from shoal.broadcast.gather import Peers
from shoal.broadcast.link import Address
from shoal.fabric.identity import node_id_of
from shoal.planning.dissemination import SOURCE, HolderPlan, Plan, Receiver, carried
from shoal.protocol.snapshot import MAX_PEERS, Peer, PeerList, PeerRecord

FORGOTTEN_AFTER_S = 300.0
"""A node that asked for no list for so long has left."""

KEPT_LISTS = 16

MAX_HOLDERS = 32
"""Named to one node: more of them than it needs to fill its link."""

UNKNOWN_BYTES_PER_S = 5e6
"""Taken for a link that nobody has measured, where no other one was: 40 Mb/s."""


class PeerBook:
    """The source's."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, tuple[float, PeerRecord]] = OrderedDict()
        """Longest ago first."""
        self._lists: OrderedDict[tuple[str, int], PeerList] = OrderedDict()

    def note(self, public_key: bytes, record: PeerRecord, now: float) -> None:
        """A node has introduced itself."""
        self._seen[public_key] = (now, record)
        self._seen.move_to_end(public_key)
        while len(self._seen) > MAX_PEERS:
            self._seen.popitem(last=False)

    def peers(self, model: str, version: int, source: Peer, now: float) -> PeerList:
        """Those among whom a version is spread: whoever was there when its list was first asked for, `source` as it
        said of itself then; and who has whole bytes at the moment."""
        key = (model, version)
        if key not in self._lists:
            peers = tuple(
                Peer(public_key=public_key, record=record)
                for public_key, (seen, record) in sorted(self._seen.items())
                if now - seen <= FORGOTTEN_AFTER_S
            )
            self._lists[key] = PeerList(source=source, peers=peers)
            while len(self._lists) > KEPT_LISTS:
                self._lists.popitem(last=False)
        holders = (item for item in reversed(self._seen.items()) if item[1][1].host and item[1][1].whole >= 0)
        newest = [
            Peer(public_key=public_key, record=record) for public_key, (_, record) in islice(holders, MAX_HOLDERS)
        ]
        return replace(self._lists[key], holders=tuple(newest))


def peers_of(listed: PeerList, own_key: bytes, num_chunks: int, kind: type[Plan] = Plan) -> Peers:
    """The plan that everyone on the list makes, and where they are."""
    known_up = [p.record.up_bytes_per_s for p in listed.peers if p.record.host and p.record.up_bytes_per_s]
    typical_up = statistics.median(known_up) if known_up else UNKNOWN_BYTES_PER_S
    receivers = tuple(_receiver(peer, typical_up) for peer in listed.peers)
    plan = kind(*carried(listed.source.record.up_bytes_per_s or typical_up, receivers), num_chunks)
    by_name = {node_id_of(peer.public_key): peer for peer in listed.peers}
    addresses = {
        number: _address(by_name[receiver.name])
        for number, receiver in enumerate(plan.receivers)
        if by_name[receiver.name].record.host
    }
    return Peers(plan, node_id_of(own_key), {**addresses, SOURCE: _address(listed.source)})


def holders_of(listed: PeerList, own_key: bytes, num_chunks: int, whole: int | None) -> Peers:
    """For chunks that nobody else is fetching at the moment: those of the whole version `whole` and the changes since,
    which some on the list say that they have; or, with `None`, of changes that were missed, from the source alone."""
    holders = tuple(p for p in listed.holders if p.record.host and p.record.whole == whole and p.public_key != own_key)
    return peers_of(PeerList(source=listed.source, peers=holders), own_key, num_chunks, HolderPlan)


def _receiver(peer: Peer, typical_up: float) -> Receiver:
    record = peer.record
    up = (record.up_bytes_per_s or typical_up) if record.host else 0.0
    return Receiver(node_id_of(peer.public_key), up, record.down_bytes_per_s or float("inf"))


def _address(peer: Peer) -> Address:
    return Address(peer.record.host, peer.record.port, peer.public_key)
