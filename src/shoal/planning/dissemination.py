"""Who passes on which chunk, so that a snapshot reaches everyone about as fast as any plan could.

With M bytes, N receivers of uplinks u_i, and T* the fluid optimum (`spreading`, where the other models are too), the
plan is Kumar and Ross's (2006): receiver i is the *relay* of a stripe of the chunks, in proportion to its uplink; the
source sends it these and it sends them to all others. What the relays cannot carry goes from the source to everyone:

    x_i = u_i T* / (M (N - 1))  at most, in proportion to u_i, until Σ x_i = 1;   the source's own share x_0 = 1 - Σ x_i

Chunks are whole things: a relay passes one on in f_i = c (N - 1) / u_i seconds, where c is its size. So each chunk of
the relays' part goes to whoever would have passed it on first, with (k_i + 1) f_i the smallest for k_i chunks given
already; who is so slow that one chunk takes longer than everything else gets none. The k-th of a relay's n_i chunks has
its place at k / n_i of the stream: the first at once, and the last early enough to be passed on.

If a relay is gone, each of its chunks falls to another one, for every node to the same one, by weighted rendezvous
hashing: nobody has to be told, and those who remain share the work by their uplinks.

Pure: no clock, no sockets. Invariants: every chunk has exactly one relay or is the source's; a node's candidates for
a chunk never include the node itself, are the same for all nodes otherwise, and end with the source.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.planning.spreading import fluid_s

SOURCE = -1
"""In place of a receiver's number: the source."""

HEADER_SHARE = 0.06
"""Of what a link carries: headers of TCP, IP and TLS on packets of 1500 bytes, and what is sent again."""

ANSWER_SHARE = 0.02
"""Of what a node takes, as much leaves by its uplink in acknowledgements: 52 bytes for every other packet."""


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


def carried(source_up: float, receivers: Sequence[Receiver]) -> tuple[float, tuple[Receiver, ...]]:
    """The uplinks of the source and the receivers as far as they are there for the snapshot itself.

    It matters for those with slow uplinks: at 5 Mb/s, what one acknowledges while it takes 60 Mb/s is a fifth of it.
    """
    downs = [r.down_bytes_per_s for r in receivers]
    taken_per_s = 1.0 / fluid_s(1.0, source_up, [r.up_bytes_per_s for r in receivers], downs) if receivers else 0.0
    left = 1.0 - HEADER_SHARE
    ups = (max(0.0, left * r.up_bytes_per_s - ANSWER_SHARE * taken_per_s) for r in receivers)
    return left * source_up, tuple(replace(r, up_bytes_per_s=up) for r, up in zip(receivers, ups, strict=True))


def deal(num_chunks: int, rates: Mapping[int, float]) -> dict[int, int]:
    """How many chunks each sender gets, by number, if each chunk goes to whoever would be done with it first."""
    counts = dict.fromkeys(rates, 0)
    # By when each would be done with one chunk more, in any unit.
    ends = [(1.0 / rate, number) for number, rate in rates.items()]
    heapq.heapify(ends)
    for _ in range(num_chunks):
        _, number = ends[0]
        counts[number] += 1
        heapq.heapreplace(ends, ((counts[number] + 1) / rates[number], number))
    return counts


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
        """Stripes interleaved, each evenly over the stream."""
        counts = self._counts()
        placed = [
            (k / count, -1.0 if number == SOURCE else self.receivers[number].up_bytes_per_s, number)
            for number, count in counts.items()
            for k in range(count)
        ]
        # Of those with the same place the slowest first: its chunk takes the longest from then on.
        return tuple(number for _, _, number in sorted(placed))

    def _counts(self) -> dict[int, int]:
        """Chunks of each relay, and of the source itself."""
        own = shares(self.source_up, self.receivers)
        relayed = round(sum(own) * self.num_chunks)
        ups = {number: r.up_bytes_per_s for number, r in enumerate(self.receivers) if own[number] > 0}
        return {SOURCE: self.num_chunks - relayed, **deal(relayed, ups)}

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


class HolderPlan(Plan):
    """Who sends which chunk to one node that comes late: the source, and the receivers, who have everything already."""

    def _counts(self) -> dict[int, int]:
        ups = {number: r.up_bytes_per_s for number, r in enumerate(self.receivers) if r.up_bytes_per_s > 0}
        return deal(self.num_chunks, {SOURCE: self.source_up, **ups})
