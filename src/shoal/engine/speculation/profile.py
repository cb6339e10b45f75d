"""What calibration found for a model: thresholds of the lossy rules, in a file beside its weights.

Invariants: the file is JSON, bounded and typed; one that is no profile is an error, never ignored; writing is atomic.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import msgspec

from shoal.errors import RecordError, StorageError
from shoal.protocol.codec import Record

FILE = "speculation.json"
MAX_BYTES = 1 << 16


class Threshold(Record, frozen=True):
    """One rule's, and what it cost when it was measured."""

    value: float
    """θ or τ."""
    loss: float
    """Share of tokens that were not the model's own."""
    loss_bound: float
    """Upper end of that share's one-sided 95 % interval: this was at most what was asked for."""
    tokens: int
    drafter: str
    """For people: what drafted then."""
    form: Literal["", "logits", "ratio", "difference"] = ""
    """Of the rule margin."""

    def check(self) -> None:
        numbers = (self.value, self.loss, self.loss_bound)
        if any(not math.isfinite(x) or x < 0 for x in numbers) or self.tokens < 0 or len(self.drafter) > 512:
            raise RecordError("a calibrated threshold is out of range.")


class Profile(Record, frozen=True):
    """A model's thresholds, where they were calibrated."""

    margin: Threshold | None = None
    semantic: Threshold | None = None

    def check(self) -> None:
        for one in (self.margin, self.semantic):
            if one is not None:
                one.check()


def load(directory: Path) -> Profile:
    """The profile of the model in this directory; an empty one where nothing was calibrated.

    Raises:
        RecordError: the file is no profile.
    """
    path = directory / FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Profile()
    try:
        if len(data) > MAX_BYTES:
            raise ValueError
        found = msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, ValueError):
        raise RecordError(f"{path} is no profile.", "Remove it, and run shoal bench calibrate again.") from None
    found.check()
    return found


def save(directory: Path, profile: Profile) -> Path:
    """Write it beside the model; gives where.

    Raises:
        StorageError: the directory can't be written.
    """
    path = directory / FILE
    try:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None
    return path
