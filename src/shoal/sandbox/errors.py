"""What can be wrong with a sandbox itself; what untrusted code does wrong is a `Result`, never an error."""

from __future__ import annotations

from shoal.errors import ShoalError


class SandboxUnavailable(ShoalError):
    """This machine lacks something that the sandbox needs; the remedy says how to get it."""


class SandboxError(ShoalError):
    """A sandbox that could not be started as asked: a path that is missing, a module that cannot be imported."""
