"""Steps around the ring, for threads that wait for them: one ring an epoch, and the place where the present one is.

    lane's thread: rings.present() ──▶ ring.round(step) ── loop: send to stage 0 … result ──▶ wakes the thread
    control:       rings.open(ring)     rings.close(why)

Invariants: a lane has at most `MAX_IN_FLIGHT` steps under way; every wait ends, with the result, with `RingBroken` as
soon as the ring is known to be broken or after `STEP_S`, or with `Interrupted` when there has been no ring for the
patience that was given; a result is believed only if it is that of the step that is waited for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass

from shoal.engine.model import Decoder
from shoal.errors import ModelError
from shoal.protocol.codec import encode
from shoal.protocol.stage import MAX_IN_FLIGHT, Step

STEP_S = 120.0
"""A step that takes longer is taken for lost: a stage lives but does not compute."""

Send = Callable[[bytes, bytes], Coroutine[None, None, None]]
"""Brings a step's header and tensor to the first stage."""


@dataclass(frozen=True)
class Weights:
    """What is served in the place of what the server began with."""

    version: int
    head: Decoder
    """With the head only."""


class RingBroken(Exception):
    """A stage is gone: the step has to be done again, on another ring."""


class Interrupted(ModelError):
    """There are too few stages, for longer than is worth waiting: what waits is given up."""


@dataclass(frozen=True)
class Result:
    """A step that has come back."""

    step: Step
    data: bytes
    seconds: float
    """From being sent."""


class Ring:
    """One epoch's stages.

    Args:
        send: called on `loop`.
        on_late: called on the loop when a step took longer than `STEP_S`.
        weights: the version that its stages have, and the head that goes with it; nothing: those of the beginning.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        epoch: int,
        num_stages: int,
        send: Send,
        on_late: Callable[[], None],
        weights: Weights | None = None,
    ) -> None:
        self.epoch = epoch
        self.weights = weights
        self.num_stages = num_stages
        self._loop = loop
        self._send = send
        self._on_late = on_late
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, int], tuple[float, Future[Result]]] = {}
        """Lane and number -> when it was sent, and who waits."""
        self._broken = ""

    def send(self, step: Step, data: bytes) -> Future[Result]:
        """From a lane's thread: a step on its way.

        Raises:
            RingBroken: it can't be.
        """
        done: Future[Result] = Future()
        with self._lock:
            if self._broken:
                raise RingBroken(self._broken)
            key = step.lane, step.number
            assert key not in self._waiting and sum(lane == step.lane for lane, _ in self._waiting) < MAX_IN_FLIGHT
            self._waiting[key] = (time.monotonic(), done)
        sending = asyncio.run_coroutine_threadsafe(self._send(encode(step), data), self._loop)
        sending.add_done_callback(lambda sent: _pass_failure(sent, done))
        return done

    def wait(self, step: Step, done: Future[Result]) -> Result:
        """From a lane's thread: the result of a step that was sent.

        Raises:
            RingBroken: there will be none from this ring.
        """
        try:
            return done.result(STEP_S)
        except Late:
            self._loop.call_soon_threadsafe(self._on_late)
            raise RingBroken(f"a step took longer than {STEP_S:.0f} s.") from None
        finally:
            self.drop(step)

    def drop(self, step: Step) -> None:
        """Nobody waits for this step any more."""
        with self._lock:
            self._waiting.pop((step.lane, step.number), None)

    def arrived(self, step: Step, data: bytes) -> None:
        """A result came; one that nobody waits for is dropped."""
        with self._lock:
            sent_at, done = self._waiting.get((step.lane, step.number), (0.0, None))
        if done is None or done.done():
            return
        if step.failure:
            done.set_exception(Interrupted(f"a stage could not compute a step: {step.failure}."))
        else:
            done.set_result(Result(step, data, time.monotonic() - sent_at))

    def breaks(self, why: str) -> None:
        """Tell everybody who waits that there will be nothing."""
        with self._lock:
            self._broken = self._broken or why
            waiting = list(self._waiting.values())
        for _, done in waiting:
            if not done.done():
                done.set_exception(RingBroken(why))


def _pass_failure(sent: Future[None], done: Future[Result]) -> None:
    error = None if sent.cancelled() else sent.exception()
    if (sent.cancelled() or error is not None) and not done.done():
        done.set_exception(RingBroken(str(error or "the loop has ended.")))


class Rings:
    """Where lanes find the present ring.

    Args:
        patience_s: how long a lane waits while there is none.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._ring: Ring | None = None
        self._why = "the stages are not there yet."
        self._since = time.monotonic()
        self._ended = False

    @property
    def ring(self) -> Ring | None:
        return self._ring

    @property
    def trouble(self) -> str:
        """Why there has been no ring for longer than is waited for; empty where there is one, or may be soon."""
        with self._changed:
            late = self._ring is None and time.monotonic() - self._since > self._patience_s
            return self._why if late or self._ended else ""

    def present(self) -> Ring:
        """From a lane's thread: the ring, once there is one.

        Raises:
            Interrupted: there has been none for too long.
        """
        with self._changed:
            while self._ring is None:
                left_s = self._since + self._patience_s - time.monotonic()
                if left_s <= 0 or self._ended:
                    raise Interrupted(self._why)
                self._changed.wait(left_s)
            return self._ring

    def open(self, ring: Ring) -> None:
        """The stages are ready."""
        with self._changed:
            self._ring = ring
            self._changed.notify_all()

    def close(self, why: str, *, final: bool = False) -> None:
        """There is no ring any more; `final`: and none will be."""
        with self._changed:
            ring, self._ring = self._ring, None
            self._why, self._ended = why, self._ended or final
            if ring is not None:
                self._since = time.monotonic()
            self._changed.notify_all()
        if ring is not None:
            ring.breaks(why)
