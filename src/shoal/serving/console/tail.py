"""Lines of a growing file, from where reading stopped last.

Invariants: a line is given once, whole, in order; an unfinished last line waits until it is finished; a line longer
than `MAX_LINE_BYTES` is passed over and counted; one call reads no more than it is told to, so that a large file is
read in pieces. A file that was replaced or cut shorter is read from its beginning, and the reader is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Lines:
    """What one call read."""

    lines: tuple[bytes, ...]
    """Without their ends; empty ones left out."""
    anew: bool = False
    """It is another file than before: what was read of the old one counts no longer."""


class Tail:
    """Reads one file, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self._is_skipping = False
        self.num_skipped = 0
        """Lines that were too long."""
        self.behind_bytes = 0
        """What the last call left unread, an unfinished line included."""
        self.size_bytes = 0

    @property
    def share_read(self) -> float:
        """How much of the file has been read."""
        return 1.0 - self.behind_bytes / self.size_bytes if self.size_bytes else 1.0

    def read(self, max_bytes: int) -> Lines:
        """The lines in the next `max_bytes` of the file."""
        assert max_bytes > MAX_LINE_BYTES, "a line must fit"
        try:
            with self._path.open("rb") as file:
                stat = self._path.stat()
                identity = (stat.st_dev, stat.st_ino)
                anew = self._identity is not None and (identity != self._identity or stat.st_size < self._offset)
                if anew:
                    self._offset, self._is_skipping, self.num_skipped = 0, False, 0
                self._identity = identity
                file.seek(self._offset)
                data = file.read(max_bytes)
        except OSError:
            anew, self._identity, self._offset = self._identity is not None, None, 0
            self.behind_bytes = self.size_bytes = 0
            return Lines((), anew)
        lines = self._split(data)
        self.size_bytes = max(stat.st_size, self._offset)
        self.behind_bytes = self.size_bytes - self._offset
        return Lines(tuple(lines), anew)

    def _split(self, data: bytes) -> list[bytes]:
        if self._is_skipping:
            end = data.find(b"\n") + 1
            self._offset += end or len(data)
            if not end:
                return []
            self._is_skipping, data = False, data[end:]
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        if len(data) - whole > MAX_LINE_BYTES:
            # Its end is not in sight: it is passed over as it comes.
            self.num_skipped += 1
            self._is_skipping = True
            self._offset += len(data) - whole
        found = [line for line in data[:whole].split(b"\n") if line.strip()]
        kept = [line for line in found if len(line) <= MAX_LINE_BYTES]
        self.num_skipped += len(found) - len(kept)
        return kept
