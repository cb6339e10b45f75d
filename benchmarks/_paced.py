"""Workers and a learner that keep to a given pace: what `capacity` measures, by real tokens, steps and snapshots.

Imported as `_paced` by the processes of a run. A paced worker draws each rollout with its engine, and hands it in when
the rollout's time is over: it has `PACED_SLOTS` servers, each of which takes `PACED_ROLLOUT_S` for a group, one after
the other. What leasing and handing in take in between, up to `PACED_FORGIVEN_S`, is not added, so that a busy machine
does not make the worker slower than it should be. A snapshot reaches it after `PACED_BCAST_S`, in which its clock
stands still (`PACED_STALL` = 1, ECHO-2's pause) or goes on (0, staging). Snapshots lie in the run's folder or, with
`PACED_RELAY_HOST`, come over the network: over direct links where that names an address, else from the learner alone.
A paced learner takes its real step, and waits until `PACED_TRAIN_S` are over.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.broadcast.tensors import TensorView
from shoal.envs.base import Environment, Observation, Split, Step, check_cursor, stable_int
from shoal.learner.advantages import grpo
from shoal.learner.trainer import Trainer
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task

SPREAD = 0.1
"""A rollout takes this much more or less than the mean, drawn evenly."""

NUM_TASKS = 64


class Clock:
    """Monotonic seconds without those in which generation stands still."""

    def __init__(self) -> None:
        self._paused_s = 0.0
        self._paused_at: float | None = None
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    def now(self) -> float:
        at = time.monotonic() if self._paused_at is None else self._paused_at
        return at - self._paused_s

    def pause(self) -> None:
        if self._paused_at is None:
            self._paused_at = time.monotonic()
            self._goes_on.clear()

    def go_on(self) -> None:
        if self._paused_at is not None:
            self._paused_s += time.monotonic() - self._paused_at
            self._paused_at = None
            self._goes_on.set()

    async def until(self, moment: float) -> None:
        while (left_s := moment - self.now()) > 0:
            await asyncio.sleep(left_s)
            await self._goes_on.wait()


clock: Clock | None = None
servers: Servers | None = None
"""Of a paced worker; other processes play episodes again, without waiting."""


class Servers:
    """When each of a worker's slots is free, and when the groups that it acts on are done."""

    def __init__(self, number: int, mean_s: float, forgiven_s: float) -> None:
        self._free_at = [0.0] * number
        self._forgiven_s = forgiven_s
        self._mean_s = mean_s
        self._ends_at: dict[str, float] = {}

    def ends_at(self, task: str, now: float) -> float:
        """When the group of `task` is done; its first rollout takes the server that has been free the longest."""
        if task not in self._ends_at:
            first = min(range(len(self._free_at)), key=self._free_at.__getitem__)
            share = stable_int("pace", task) % 10_001 / 10_000
            began = max(self._free_at[first], now - self._forgiven_s)
            self._free_at[first] = self._ends_at[task] = began + self._mean_s * (1 - SPREAD + 2 * SPREAD * share)
        return self._ends_at[task]


class FirstDigit(Environment):
    """A reply that begins with a digit earns 1."""

    _ends_at = 0.0

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        return Task(env=self.name, id=f"{split}-{index}", seed=0)

    async def reset(self, task: Task) -> Observation:
        if clock is not None and servers is not None:
            self._ends_at = servers.ends_at(task.id, clock.now())
        return Observation((Message(role="user", content=f"{int(task.id.rpartition('-')[2]) % NUM_TASKS}?"),))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        if clock is not None:
            await clock.until(self._ends_at)
        right = float(action[:1].isdigit())
        return Step("", right, True, {"strict": right, "lenient": float(any(c.isdigit() for c in action))})


def padded(rewards: NDArray[np.float64], *, scale_by_std: bool, delta: float) -> NDArray[np.float64]:
    """GRPO's advantages, in a learner whose steps take their time from its second step on."""
    if not getattr(Trainer.step, "is_padded", False):
        Trainer.step = _padded(Trainer.step)  # type: ignore[method-assign]
    return grpo(rewards, scale_by_std=scale_by_std, delta=delta)


def _padded(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def stretched(*given: Any) -> Any:
        ends_at = time.monotonic() + float(os.environ["PACED_TRAIN_S"])
        metrics = step(*given)
        time.sleep(max(0.0, ends_at - time.monotonic()))
        return metrics

    stretched.is_padded = True  # type: ignore[attr-defined]
    return stretched


def work(ticket_text: str, name: str, run: str) -> None:
    """Be a paced worker until the run is over."""
    asyncio.run(_work(ticket_text, name, Path(run)))


async def _work(ticket_text: str, name: str, run: Path) -> None:
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.ticket import Ticket
    from shoal.rollout.host import WorkerOptions, worker_identity, working

    global clock, servers
    pace = clock = Clock()
    mean_s, forgiven_s = float(os.environ["PACED_ROLLOUT_S"]), float(os.environ["PACED_FORGIVEN_S"])
    servers = Servers(int(os.environ["PACED_SLOTS"]), mean_s, forgiven_s)
    bcast_s, stalls = float(os.environ["PACED_BCAST_S"]), os.environ["PACED_STALL"] == "1"
    options = WorkerOptions(
        name=name,
        device="cpu",
        max_sequences=int(os.environ["PACED_SLOTS"]) * int(os.environ["PACED_GROUP_SIZE"]),
        cache_tokens=4096,
        local_store=None if "PACED_RELAY_HOST" in os.environ else run / "snapshots",
        relay_host=os.environ.get("PACED_RELAY_HOST", ""),
    )
    ticket = Ticket.decode(ticket_text)
    with worker_identity(run / "identity" / name) as identity:
        async with (
            await Fabric.connect(identity, ticket, options.join_timeout_s) as fabric,
            working(fabric, ticket, options) as worker,
        ):
            fetch = worker.policy._source

            async def slowly(version: int) -> Mapping[str, TensorView]:
                if stalls:
                    pace.pause()
                try:
                    arrives_at = time.monotonic() + bcast_s
                    tensors = await fetch(version)
                    await asyncio.sleep(arrives_at - time.monotonic())
                    return tensors
                finally:
                    pace.go_on()

            worker.policy._source = slowly
            await worker.run()
