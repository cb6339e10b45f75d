"""Secrets on disk, readable by their owner only.

Invariants: a file is replaced whole or not at all; it is never, not even for a moment, readable by others; a file
that others can read is refused, because what is in it may be known already.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shoal.errors import StorageError

MAX_FILE_BYTES = 16 * 2**20


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` by a file with mode 0600 that holds `data`.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"the file {path} cannot be written: {error.strerror}.", "Make room, or make its directory writable."
        ) from error


def read_private(path: Path) -> bytes | None:
    """What `path` holds, or `None` where there is no such file.

    Raises:
        StorageError: it cannot be read, is far too large, or other users can read it.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise StorageError(
                    f"the file {path} holds secrets and can be read by other users.",
                    f"Run: chmod 600 {path}, and issue new secrets if others may have read it.",
                )
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"the file {path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise StorageError(f"the file {path} is larger than {MAX_FILE_BYTES} bytes.", "Restore it or delete it.")
    return data
