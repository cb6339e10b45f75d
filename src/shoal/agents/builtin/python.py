"""Python programs, run in the sandbox: no files, no network, limits on time, memory and output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field

from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.sandbox import Job, Limits, Program, Sandbox, SandboxError, SandboxUnavailable

LIMITS = Limits(wall_s=20.0, cpu_s=15.0, memory_bytes=256 << 20, output_bytes=64 << 10)
MAX_PROGRAM_CHARS = 64 * 1024


class Ran(BaseModel):
    """What a program printed, and how it ended."""

    stdout: str
    stderr: str
    ended: str
    """`ok`, `exit`, or the limit that it broke."""


async def run_python(
    program: Annotated[
        str, Field(description="a whole program; print what you want to know", max_length=MAX_PROGRAM_CHARS)
    ],
) -> Ran:
    """Run a Python program that has the standard library and nothing else; returns what it prints."""
    try:
        found = await _SANDBOX.run(Program(Job(source=program)), LIMITS)
    except SandboxUnavailable as error:
        raise ToolError(str(error)) from None
    except SandboxError as error:
        raise ToolError(str(error), retryable=True) from None
    return Ran(
        stdout=found.stdout.decode("utf-8", "replace"),
        stderr=found.stderr.decode("utf-8", "replace"),
        ended=found.reason,
    )


_SANDBOX = Sandbox()


def tools() -> Sequence[Callee]:
    """The sandboxed interpreter."""
    return [FunctionTool(run_python, Use(idempotent=True, max_concurrency=4, timeout_s=60))]
