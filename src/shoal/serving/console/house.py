"""Everything that the console looks at, and the tasks that keep looking.

Files, the log and the store are read on one thread of their own (`on_reader`), which views are written on as well: what
the sources hold belongs to that thread. Coordinators and servers are asked from the event loop; what they said is
replaced as a whole.

Invariants: while nobody looks, nothing is read or asked; a source that fails is shown as such, and tried again; when
`looking` returns, no task and no thread of ours is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.serving.console.agents import AgentLog
from shoal.serving.console.asked import ASK_S, Coordinator, Server
from shoal.serving.console.live import Live
from shoal.serving.console.memories import Memories
from shoal.serving.console.runs import RunFolder
from shoal.serving.console.voices import Voices

logger = logging.getLogger("shoal.console")

VIEWS = ("overview", "run", "swarm", "agents", "memory", "episodes", "playground")

LOOK_S = 1.0
IDLE_S = 30.0
"""After the last page was asked for, and while none is open, nothing is looked at any more."""

T = TypeVar("T")


@dataclass
class Watched:
    """One run: its folder, its coordinator, or both."""

    name: str
    folder: RunFolder | None = None
    coordinator: Coordinator | None = None


class House:
    """What is looked at."""

    def __init__(
        self,
        runs: Iterable[Watched] = (),
        *,
        agents: AgentLog | None = None,
        memories: Memories | None = None,
        server: Server | None = None,
        voices: Voices | None = None,
    ) -> None:
        self.runs = {run.name: run for run in runs}
        self.agents, self.memories, self.server = agents, memories, server
        self.voices = voices or Voices({})
        self.live = Live(VIEWS)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="console")
        self._looked_at = time.monotonic()

    def run(self, name: str) -> Watched | None:
        """A run by its name, or the first one."""
        return self.runs.get(name) or next(iter(self.runs.values()), None)

    async def on_reader(self, work: Callable[[], T]) -> T:
        """Do something on the thread that everything read belongs to."""
        self._looked_at = time.monotonic()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @property
    def is_looked_at(self) -> bool:
        """Whether a page is open, or was lately."""
        return self.live.num_watchers > 0 or time.monotonic() - self._looked_at < IDLE_S

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Keep looking while inside."""
        tasks = [_owned(self._read())]
        if self.server is not None:
            tasks.append(_owned(self._ask(self.server)))
        for run in self.runs.values():
            if run.coordinator is not None:
                asking = run.coordinator.follow(lambda: self.is_looked_at, lambda: self.live.touch("overview", "swarm"))
                tasks.append(_owned(asking))
        try:
            async with self.voices.open():
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
            self._thread.shutdown()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self.is_looked_at:
                views, is_behind = await loop.run_in_executor(self._thread, self.read_on)
                self.live.touch(*views)
                if is_behind:
                    continue
            await asyncio.sleep(LOOK_S)

    def read_on(self) -> tuple[list[str], bool]:
        """Read whatever is new; the views that it changes, and whether there is more to read at once."""
        views: set[str] = set()
        is_behind = False
        for run in self.runs.values():
            if run.folder is not None:
                if run.folder.read():
                    views |= {"overview", "run", "swarm", "episodes"}
                is_behind |= run.folder.num_behind > 0
        if self.agents is not None and self.agents.read():
            views |= {"overview", "agents"}
        if self.memories is not None and self.memories.read():
            views |= {"overview", "memory"}
        return [view for view in VIEWS if view in views], is_behind

    async def _ask(self, server: Server) -> None:
        while True:
            if self.is_looked_at:
                models = server.models
                if await server.look():
                    self.live.touch("overview")
                if server.models != models:
                    self.live.touch("playground")
            await asyncio.sleep(ASK_S)

    def _close(self) -> None:
        if self.agents is not None:
            self.agents.close()
        if self.memories is not None:
            self.memories.close()


def _owned(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that looks; a defect that ends it is logged when it happens, and the pages go on with what they have."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the console looks no longer: %r", error)

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task
