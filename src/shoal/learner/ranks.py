"""The learner's processes where it has several: which of them this is, and what they tell each other.

    rank 0, which leads      announce(order, payload) ──▶ store, then broadcast ──▶ told()      every other rank

The leader speaks with the coordinator; the others do what it announces, which is mostly their part of a step. Orders go
through the store that torchrun keeps for its processes: who waits for one looks for it again and again, so a run that
waits for rollouts all night runs into no time-out of a collective. Everything else is a collective that all are in.

Invariants: every rank makes the same collectives in the same order, because all of them follow from orders; nothing
that is received is unpickled; a rank whose leader is gone ends, since torchrun ends them all together.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlencode

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from shoal.errors import ModelError, RunError

STORE_VARIABLE = "SHOAL_RANKS_STORE"
"""Names the file in which ranks meet; without it they meet in the store of the torchrun that started them."""

POLL_S = 0.02
"""Between two looks for the next order."""

COLLECTIVE_TIMEOUT_S = 1800.0
"""Within an order all ranks compute the same amount: one that is this late is stuck."""

MAX_PAYLOAD_BYTES = 2**31


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leads() -> bool:
    """Whether this process speaks for the learner: it is the first rank, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def rank_device(name: str) -> torch.device:
    """What this rank computes on: of GPUs, the one that torchrun's numbering gives it.

    Raises:
        ModelError: there are fewer GPUs than ranks on this machine.
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    if device.type != "cuda":
        return device
    if number >= torch.cuda.device_count():
        raise ModelError(
            f"rank {number} has no GPU: there are {torch.cuda.device_count()}.", "Lower learner.processes."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


class Ranks:
    """This process among the learner's.

    Args:
        device: what the model computes on here; its type decides the backend (gloo, or NCCL beside it).
    """

    def __init__(self, device: torch.device) -> None:
        where = "env://"
        if STORE_VARIABLE in os.environ:
            named = {"rank": os.environ["RANK"], "world_size": os.environ["WORLD_SIZE"]}
            where = f"file://{os.environ[STORE_VARIABLE]}?{urlencode(named)}"
        self._store, self.rank, self.size = next(rendezvous(where))
        self.device = device
        self._number = 0
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(
            backend,
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def announce(self, order: str, payload: bytes = b"") -> None:
        """Say to all others what is done now; by the leader, which then does its part of it."""
        assert self.leads and len(payload) < MAX_PAYLOAD_BYTES
        self._number += 1
        self._store.set(self._key, f"{order} {len(payload)}")
        if payload:
            dist.broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8), src=0)

    def told(self) -> tuple[str, bytes]:
        """The leader's next order, however long it takes."""
        self._number += 1
        while not self._store.check([self._key]):
            time.sleep(POLL_S)
        order, length = self._store.get(self._key).decode().split(" ")
        if not 0 <= int(length) < MAX_PAYLOAD_BYTES:
            raise RunError(f"an order of the learner's leader has {length} bytes.")
        payload = torch.empty(int(length), dtype=torch.uint8)
        if len(payload):
            dist.broadcast(payload, src=0)
        return order, payload.numpy().tobytes()

    @property
    def _key(self) -> str:
        return f"order/{self._number}"

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """What every rank gave, by rank, in double precision; all give equally many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def norm(self, own: float) -> float:
        """The norm of a vector of which each rank has a part, from the parts' norms."""
        return math.sqrt(math.fsum(part * part for (part,) in self.gathered([own])))

    def close(self) -> None:
        """Leave the group; after the last order."""
        dist.destroy_process_group()
