"""Who waits for whom, since when and how long at most: one register for the whole process.

    with waiting("the batch of step 7", whom=coordinator_key, until="the run ends"):
        ...

Whoever waits for something of consequence says so here; `open_waits` is what `shoal status`, the live view and
`shoal debug dump` tell of it. A single request inside a wait that says what it is for is a detail, told in a dump only.

Invariants: a wait is listed from `__enter__` to `__exit__` (`begin` to `end`) whatever happens between; the register
holds at most `MAX_OPEN` waits (more are counted, and not listed); it never holds up or fails what waits. Works from any
thread. Costs 1.2 µs a wait where a signed request takes some 300.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from shoal.fabric.identity import node_id_of
from shoal.protocol.status import Wait, clipped

MAX_OPEN = 10_000
"""Far more than any node has requests under way."""

USUAL_S = 4.0
"""A wait for one answer that lasts longer than this is worth a line, unless whoever waits knows better."""

ENDLESS_S = float("inf")
"""For waits that may last as long as they like: an idle worker's for work."""

_open: dict[int, waiting] = {}
_inside: contextvars.ContextVar[waiting | None] = contextvars.ContextVar("shoal_waiting", default=None)
_num_unlisted = 0


class waiting:
    """Lists a wait while inside `with`, or from `begin` to `end` where it outlives the task that began it.

    Args:
        what: as in “waits for …”.
        whom: public key, node id or name of the one who must act.
        deadline_s: the longest it may take.
        until: where there is no such time, what ends the wait.
        usual_s: longer than this it never takes where all is well.
        is_detail: of no interest where it is part of another wait.
    """

    __slots__ = ("_outer", "deadline_s", "is_detail", "is_open", "since", "until", "usual_s", "what", "whom")

    def __init__(
        self,
        what: str,
        *,
        whom: str | bytes = "",
        deadline_s: float = 0.0,
        until: str = "",
        usual_s: float = USUAL_S,
        is_detail: bool = False,
    ) -> None:
        self.what = what
        self.whom = whom
        self.deadline_s = deadline_s
        self.until = until
        self.usual_s = usual_s
        self.is_detail = is_detail
        self.since = 0.0
        self.is_open = False
        self._outer: waiting | None = None

    def begin(self) -> Self:
        """List it, as part of no other wait."""
        global _num_unlisted
        self.since = time.monotonic()
        self.is_open = True
        if len(_open) < MAX_OPEN:
            _open[id(self)] = self
        else:
            _num_unlisted += 1
        return self

    def end(self) -> None:
        """List it no more; a second time does nothing."""
        self.is_open = False
        _open.pop(id(self), None)

    @contextmanager
    def parts(self) -> Iterator[None]:
        """Inside, waits that are details are details of this one."""
        outer = _inside.get()
        _inside.set(self)
        try:
            yield
        finally:
            _inside.set(outer)

    def moved(self) -> None:
        """What is waited for has come nearer: its time counts from now."""
        self.since = time.monotonic()

    def __enter__(self) -> Self:
        self._outer = _inside.get()
        _inside.set(self)
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        _inside.set(self._outer)

    @property
    def is_nested(self) -> bool:
        """Whether it is a detail of another wait. A task that outlives the wait it was made in is none."""
        return self.is_detail and self._outer is not None and self._outer.is_open

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def record(self) -> Wait:
        """For those who ask this node how it is."""
        seconds = self.seconds
        return Wait(
            what=clipped(self.what),
            whom=clipped(name_of(self.whom)),
            seconds=seconds,
            deadline_s=self.deadline_s,
            until=clipped(self.until),
            overdue=seconds > self.usual_s,
            nested=self.is_nested,
        )

    def bounds(self) -> str:
        """Whom it waits for and since when, for the text of an error: “from node 0123…, asked at 12:00:01 UTC”."""
        asked_at = time.strftime("%H:%M:%S", time.gmtime(time.time() - self.seconds))
        whom = f"from node {name_of(self.whom)}, " if self.whom else ""
        return f"{whom}asked at {asked_at} UTC"


def name_of(whom: str | bytes) -> str:
    """A public key's node id; a name is its own."""
    return node_id_of(whom) if isinstance(whom, bytes) and whom else str(whom or "")


def open_waits(*, nested: bool = True) -> list[Wait]:
    """All waits of this process, the longest first."""
    found = [wait.record() for wait in list(_open.values()) if nested or not wait.is_nested]
    return sorted(found, key=lambda wait: -wait.seconds)


def num_unlisted() -> int:
    """Waits that found the register full, since the process began."""
    return _num_unlisted


def in_words(wait: Wait, whom: str = "") -> str:
    """“chunk 3 of version 7 from the learner, 6 s, deadline 30 s”; `whom` is what people call it."""
    source = whom or wait.whom
    text = f"{wait.what}{f' from {source}' if source else ''}, {wait.seconds:.0f} s"
    if wait.deadline_s:
        return f"{text}, deadline {wait.deadline_s:.0f} s"
    return f"{text}, until {wait.until}" if wait.until else text
