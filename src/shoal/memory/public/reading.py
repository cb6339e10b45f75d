"""Reading a public file: bounded, typed, and with the place named where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.errors import ConfigError

MAX_FILE_BYTES = 2 * 2**30
MAX_LINE_BYTES = 16 * 2**20

T = TypeVar("T")


def read_lines(path: Path, kind: type[T], most: int = 0) -> list[T]:
    """The objects of a JSON Lines file, the first `most` of them (0: all).

    Raises:
        ConfigError: the file is not there, too large, or a line is not of this kind.
    """
    found: list[T] = []
    _check(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{path}, line {number}, is longer than {MAX_LINE_BYTES} bytes.")
            try:
                found.append(msgspec.json.decode(line, type=kind))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: {error}.", "Is it the published file?") from None
            if len(found) == most:
                break
    return found


def read_whole(path: Path, kind: type[T]) -> T:
    """The one JSON value of a file; raises as `read_lines`."""
    _check(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}.", "Is it the published file?") from None


def _check(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}.", "Get the set from its publisher.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB.")
