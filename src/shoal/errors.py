"""The errors a user can meet, each with what was wrong, where, and what to do about it.

Invariant: a `ShoalError` is the user's to act on, so the command line prints its message alone, without a
traceback, and exits with `exit_code`. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of every error that a user can act on.

    Args:
        problem: what is wrong, in one sentence, naming the offending value.
        remedy: what to do about it, in one sentence; printed after the problem.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy


class ConfigError(ShoalError):
    """A configuration file, key or override that cannot be used."""


class ModelError(ShoalError):
    """A model that is missing, damaged, or of an unsupported type."""


class CapacityError(ShoalError):
    """A request or run that cannot fit in the memory it was given."""


class RecordError(ShoalError):
    """Bytes from a disk or another node that are not the record they should be."""


class NetworkError(ShoalError):
    """An address that cannot be bound or reached, or a peer that did not answer before its deadline."""


class TicketError(ShoalError):
    """A join ticket that is malformed, expired, or not for this run."""


class JoinRefused(ShoalError):
    """The coordinator answered a join request with a refusal; `problem` carries its reason."""


class TaskError(ShoalError):
    """A task, environment or data file that cannot be used."""


class StorageError(ShoalError):
    """A disk that is full, read-only, or holds a damaged file."""


class RunError(ShoalError):
    """A run that cannot start, continue or be found."""
