"""How long answers are waited for: as long as they take here and now, and a margin; never less than a floor.

    mean ← mean + (took − mean) / 8        spread ← spread + (|took − mean| − spread) / 4        RFC 6298, 2.3
    limit = max(floor, mean + 4·spread) · 2^(answers of this peer in a row that did not come)    RFC 6298, 2.3 and 5.5

One estimate of mean and spread a node, and not one a peer as TCP has it: what makes answers late here is mostly a busy
machine, this one or the one that all share, and most peers are asked too seldom to know them by themselves.

Invariants: a limit lies between its floor and `MOST_S` (or the floor, if that is longer); an answer takes its peer's
doublings back; a node that is known to be gone is no silence; of at most `MAX_PEERS` peers anything is remembered.
`Patience` is pure: seconds come from whoever measures.
"""

from __future__ import annotations

import time

from shoal.errors import NetworkError
from shoal.fabric.call import ABSENT_GRACE_S
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric

MOST_S = 30.0
"""Whoever has not answered by then is not merely slow."""

MAX_DOUBLINGS = 4
MAX_PEERS = 4096


class Patience:
    """How long answers take, and how long they are worth waiting for."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._spread_s = 0.0
        self._num_answers = 0
        self._num_late: dict[bytes, int] = {}

    def answered(self, took_s: float, peer: bytes = b"") -> None:
        """An answer came."""
        self._num_late.pop(peer, None)
        self._num_answers += 1
        if self._num_answers == 1:
            self._mean_s, self._spread_s = took_s, took_s / 2
            return
        self._spread_s += (abs(took_s - self._mean_s) - self._spread_s) / 4
        self._mean_s += (took_s - self._mean_s) / 8

    def late(self, peer: bytes) -> None:
        """None came in time."""
        if len(self._num_late) >= MAX_PEERS:
            self._num_late.clear()
        self._num_late[peer] = min(self._num_late.get(peer, 0) + 1, MAX_DOUBLINGS)

    def limit_s(self, floor_s: float, peer: bytes = b"") -> float:
        """How long to wait for a peer's answer, at least `floor_s`."""
        usual_s = max(floor_s, self._mean_s + 4 * self._spread_s)
        return max(floor_s, min(usual_s * (1 << self._num_late.get(peer, 0)), MOST_S))


class Asking:
    """A node's requests to others, with a patience that all of them share."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.patience = Patience()

    async def request(
        self,
        key: str,
        body: bytes,
        floor_s: float,
        *,
        to: bytes,
        max_reply_bytes: int,
        absent_grace_s: float = ABSENT_GRACE_S,
    ) -> bytes:
        """As `Fabric.request`; for questions that are answered at once.

        Args:
            floor_s: wait at least so long.

        Raises:
            NetworkError: as there.
        """
        limit_s = self.patience.limit_s(floor_s, to)
        began = time.monotonic()
        try:
            answer = await self.fabric.request(
                key, body, limit_s, to=to, max_reply_bytes=max_reply_bytes, absent_grace_s=absent_grace_s
            )
        except RemoteError:
            self.patience.answered(time.monotonic() - began, to)  # No is an answer.
            raise
        except NetworkError:
            if time.monotonic() - began >= limit_s:
                self.patience.late(to)
            raise
        self.patience.answered(time.monotonic() - began, to)
        return answer
