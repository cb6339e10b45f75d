"""Who passes on which chunk, so that a snapshot reaches everyone about as fast as any plan could.

With M bytes, N receivers of uplinks u_i, and T* the fluid optimum (`spreading`, where the other models are too), the
plan is Kumar and Ross's (2006): receiver i is the *relay* of a stripe of the chunks, in proportion to its uplink; the
source sends it these and it sends them to all others. What the relays cannot carry goes from the source to everyone:

    x_i = u_i T* / (M (N - 1))  at most, in proportion to u_i, until Σ x_i = 1;   the source's own share x_0 = 1 - Σ x_i

If a relay is gone, each of its chunks falls to another one, for every node to the same one, by weighted rendezvous
hashing: nobody has to be told, and those who remain share the work by their uplinks.

Pure: no clock, no sockets. Invariants: every chunk has exactly one relay or is the source's; a node's candidates for
a chunk never include the node itself, are the same for all nodes otherwise, and end with the source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from shoal.planning.spreading import fluid_s

SOURCE = -1
"""In place of a receiver's number: the source."""


@dataclass(frozen=True)
class Receiver:
    """A node that is to have the snapshot.

    Args:
        name: unlike all others; orders the receivers, so that all nodes make the same plan.
        up_bytes_per_s: what it can send; 0 if nobody can connect to it.
        down_bytes_per_s: what it can take.
    """

    name: str
    up_bytes_per_s: float
    down_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        assert self.up_bytes_per_s >= 0 and self.down_bytes_per_s > 0


def shares(source_up: float, receivers: Sequence[Receiver]) -> tuple[float, ...]:
    """x_i: the part of the snapshot that each receiver relays; what is left to 1 is the source's own."""
    if len(receivers) < 2:
        return (0.0,) * len(receivers)
    uplinks = [r.up_bytes_per_s for r in receivers]
    per_byte_s = fluid_s(1.0, source_up, uplinks, [r.down_bytes_per_s for r in receivers])
    most = [up * per_byte_s / (len(receivers) - 1) for up in uplinks]
    scale = min(1.0, 1.0 / sum(most)) if sum(most) > 0 else 0.0
    return tuple(share * scale for share in most)


@dataclass(frozen=True)
class Plan:
    """Who relays what.

    Args:
        source_up: bytes per second that the source can send.
        receivers: every node makes the same plan of the same receivers, whatever their order.
        num_chunks: of the snapshot.
    """

    source_up: float
    receivers: tuple[Receiver, ...]
    num_chunks: int
    relays: tuple[int, ...] = field(init=False)
    """Of each chunk, the number of its relay among the `receivers`, or `SOURCE`."""

    def __post_init__(self) -> None:
        assert self.source_up > 0 and len({r.name for r in self.receivers}) == len(self.receivers)
        object.__setattr__(self, "receivers", tuple(sorted(self.receivers, key=lambda r: r.name)))
        object.__setattr__(self, "relays", self._assign())

    def _assign(self) -> tuple[int, ...]:
        """Stripes interleaved: each chunk to whoever is furthest behind its share."""
        own = shares(self.source_up, self.receivers)
        parts = [*own, max(0.0, 1.0 - sum(own))]
        due = [0.0] * len(parts)
        relays = []
        for _ in range(self.num_chunks):
            due = [behind + part for behind, part in zip(due, parts, strict=True)]
            chosen = max(range(len(parts)), key=due.__getitem__)
            due[chosen] -= 1.0
            relays.append(chosen if chosen < len(own) else SOURCE)
        return tuple(relays)

    def number_of(self, name: str) -> int | None:
        """A receiver's number; `None` for a node that joined after the plan was made."""
        return next((i for i, r in enumerate(self.receivers) if r.name == name), None)

    def provider(self, chunk: int, name: str, gone: Collection[int] = ()) -> int:
        """Whom the node called `name` asks for a chunk: its relay or, if that is `gone`, the one that stands in."""
        relay = self.relays[chunk]
        if relay in gone:
            relay = self._stand_in(chunk, gone)
        return SOURCE if relay == SOURCE or self.receivers[relay].name == name else relay

    def _stand_in(self, chunk: int, gone: Collection[int]) -> int:
        left = [i for i, r in enumerate(self.receivers) if i not in gone and r.up_bytes_per_s > 0]
        return max(left, key=lambda i: self._score(chunk, i), default=SOURCE)

    def _score(self, chunk: int, number: int) -> float:
        """Weighted rendezvous hashing: the highest of w / -ln(uniform) wins as often as its weight says."""
        receiver = self.receivers[number]
        digest = hashlib.blake2b(f"{chunk} {receiver.name}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 2)
        return receiver.up_bytes_per_s / -math.log(uniform)
