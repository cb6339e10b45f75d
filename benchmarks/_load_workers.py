"""Some of many light workers: real ones (lease, engine, submission) with a tiny model, so many to a process.

    python _load_workers.py TICKET_FILE STORE FIRST COUNT

They join one after the other, print `joined` once all have, and work until SIGTERM or the run's end. Then one line of
JSON: how long each request to the coordinator took, and how many rollouts each worker handed in.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from shoal.coordinator.processes import die_with_parent
from shoal.errors import NetworkError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.rollout.host import WorkerOptions, working
from shoal.rollout.link import RunLink

CONNECT_S = 60.0
GRACE_S = 2.0
VERBS = ("lease", "heartbeat", "submit")


def timed(link: RunLink, times: dict[str, list[float]], misses: dict[str, int]) -> None:
    """Note how long each request of this link takes, from now on."""

    def wrap(verb: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def measured(*args: Any, **kwargs: Any) -> Any:
            began_s = time.monotonic()
            try:
                return await call(*args, **kwargs)
            except NetworkError:
                misses[verb] += 1
                raise
            finally:
                times[verb].append(round(time.monotonic() - began_s, 5))

        return measured

    for verb in VERBS:
        setattr(link, verb, wrap(verb, getattr(link, verb)))


async def main(ticket: Ticket, store: Path, first: int, count: int) -> None:
    times: dict[str, list[float]] = {verb: [] for verb in VERBS}
    misses = dict.fromkeys(VERBS, 0)
    async with AsyncExitStack() as stack:
        workers = []
        for number in range(first, first + count):
            fabric = await stack.enter_async_context(await Fabric.connect(Identity.generate(), ticket, CONNECT_S))
            options = WorkerOptions(
                name=f"light-{number}", device="cpu", max_sequences=8, cache_tokens=512, local_store=store
            )
            worker = await stack.enter_async_context(working(fabric, ticket, options))
            timed(worker._link, times, misses)
            workers.append(worker)
        print("joined", flush=True)

        def stop() -> None:
            for worker in workers:
                worker.stop()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        await asyncio.gather(*(worker.run(GRACE_S) for worker in workers))
        submitted = [worker.num_submitted for worker in workers]
    print(json.dumps({"times": times, "misses": misses, "submitted": submitted}), flush=True)


if __name__ == "__main__":
    die_with_parent()
    given = Ticket.decode(Path(sys.argv[1]).read_text())
    asyncio.run(main(given, Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
