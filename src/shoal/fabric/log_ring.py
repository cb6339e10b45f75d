"""The newest log lines of this process, for those who ask a node for its logs.

Invariants: at most `MAX_LINES` lines of `MAX_LINE_CHARS` are kept, numbered without gaps within one life of the
process; what looks like a ticket or a key is blotted out before it is kept. Handlers that were there before go on as
they did.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterable

from shoal.protocol.status import MAX_LINE_CHARS, MAX_LINES, LogLine, LogReply, LogRequest, clipped

SECRETS = re.compile(r"\bshoal[a-z]?\d[A-Za-z0-9_-]{16,}|\b[0-9a-fA-F]{48,}\b")
"""Tickets, router lines, and secrets or keys in hexadecimal. Node ids (16 digits) and short hashes pass."""

ANSWER_CHARS = 4 * 2**20
"""Text in one answer, about; whoever wants more asks again."""


def redacted(text: str) -> str:
    """`text` without anything that looks like a secret."""
    return SECRETS.sub("[secret]", text)


class LogRing(logging.Handler):
    """Keeps what is logged. One a process; see `log_ring`."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.life = time.time()
        self._lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        self._next = 0
        self._adding = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except (TypeError, ValueError):
            self.handleError(record)  # A wrong format string is a defect, and not a reason to end what logged it.
            return
        text = clipped(redacted(text), MAX_LINE_CHARS)
        with self._adding:
            self._lines.append(LogLine(number=self._next, time=record.created, level=record.levelname[:16], text=text))
            self._next += 1

    def read(self, request: LogRequest) -> LogReply:
        """The lines asked for, as many as fit an answer: the newest ones, or those that follow the cursor."""
        with self._adding:
            lines, following = list(self._lines), request.after >= 0 and request.life == self.life
        if not following:
            newest = _as_fit(reversed(lines[-request.limit :]))
            return LogReply(lines=tuple(reversed(newest)), life=self.life)
        newer = [line for line in lines if line.number > request.after]
        missed = newer[0].number - request.after - 1 if newer else 0
        return LogReply(lines=tuple(_as_fit(newer[: request.limit])), life=self.life, missed=missed)


def _as_fit(lines: Iterable[LogLine]) -> list[LogLine]:
    """The first of them, as many as fit an answer; at least one."""
    chosen: list[LogLine] = []
    chars = 0
    for line in lines:
        chars += len(line.text)
        if chars > ANSWER_CHARS and chosen:
            break
        chosen.append(line)
    return chosen


_ring: LogRing | None = None


def log_ring() -> LogRing:
    """This process's ring, put in place on the first call."""
    global _ring
    if _ring is None:
        _ring = LogRing()
        root, ours = logging.getLogger(), logging.getLogger("shoal")
        if not root.handlers and logging.lastResort is not None:
            root.addHandler(logging.lastResort)  # With a handler of ours, Python would no longer print warnings.
        root.addHandler(_ring)
        if ours.level == logging.NOTSET and ours.getEffectiveLevel() > logging.INFO:
            ours.setLevel(logging.INFO)
    return _ring
