"""The only room that runs untrusted code: Python, TypeScript and programs, behind walls that the kernel keeps.

    Program = Job (code, input) + Setup (runtime, folders to read, addresses to reach)
    Sandbox().run(Program(...), Limits(...)) -> Result        a fresh sandbox for each program
    WorkerPool(Setup(...), Limits(...)).run(Job(...)) -> Result   sandboxes that have imported beforehand

Every sandbox is bubblewrap's: new user, process, network, mount, IPC and host-name namespaces, a user that nobody
is, a filter on system calls, an empty environment, one small scratch folder, resource limits, and a supervisor of
ours as its first process (`guest`). Deno runs inside the same walls, with its own permissions as a second set.

Invariants: untrusted code decides nothing but the contents of its `Result`; the host opens no path that untrusted
code has made; nothing inside outlives this process. What is not covered is said in docs/sandbox.md.
"""

from shoal.sandbox.availability import Availability, Missing
from shoal.sandbox.errors import SandboxError, SandboxUnavailable
from shoal.sandbox.job import (
    DenoRuntime,
    Job,
    Limits,
    NativeRuntime,
    Program,
    PythonRuntime,
    Reason,
    Relay,
    Result,
    Setup,
)
from shoal.sandbox.sandbox import Sandbox
from shoal.sandbox.workers import WorkerPool

__all__ = [
    "Availability",
    "DenoRuntime",
    "Job",
    "Limits",
    "Missing",
    "NativeRuntime",
    "Program",
    "PythonRuntime",
    "Reason",
    "Relay",
    "Result",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "Setup",
    "WorkerPool",
]
