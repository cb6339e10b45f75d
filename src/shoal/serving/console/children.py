"""Processes that the playground starts: one that writes a version as a checkpoint, and servers of checkpoints.

Invariants: each ends with the console, however that ends (`die_with_parent`); each start has a deadline; a server
listens on loopback and asks for a key that only this process knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from shoal.coordinator.processes import child_of_this
from shoal.errors import ModelError
from shoal.serving.console.answers import Endpoint

START_S = 180.0
END_S = 5.0
MAX_TAIL_BYTES = 4096


@dataclass
class Child:
    """A server of one version."""

    process: asyncio.subprocess.Process
    endpoint: Endpoint
    folder: Path
    """Removed when it ends."""
    uses: int = 0

    async def end(self) -> None:
        await _ended(self.process)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


async def wrote_version(run: Path, version: str, folder: Path) -> None:
    """Write a published version of a run as a checkpoint, `folder/model`.

    Raises:
        ModelError: it cannot be; says why.
    """
    with (folder / "log").open("wb") as log:
        process = await _process("_version", str(run), version, str(folder / "model"), log=log)
    try:
        async with asyncio.timeout(START_S):
            await process.wait()
    except TimeoutError:
        raise ModelError(f"its weights were not put together within {START_S:.0f} s.") from None
    finally:
        await _ended(process)
    if process.returncode:
        raise ModelError(_last_words(folder / "log"))


async def served(model: Path, folder: Path, name: str, draft: str) -> Child:
    """A server of the checkpoint `model`, once it listens; `folder` is its own, and goes with it.

    Raises:
        ModelError: it cannot be served; says why.
    """
    key = secrets.token_urlsafe(32)
    arguments = ["serve", str(model), "--port", "0", "--json", "--name", name, "--max-sequences", "4"]
    arguments += ["--context-tokens", "2048"] + (["--draft", draft] if draft else [])
    with (folder / "log").open("wb") as log:
        process = await _process(*arguments, log=log, SHOAL_API_KEYS=key)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        if not line:
            raise ModelError(_last_words(folder / "log"))
        port = int(msgspec.json.decode(line, type=dict[str, Any])["port"])
    except (TimeoutError, msgspec.DecodeError, KeyError, ValueError):
        await _ended(process)
        raise ModelError(f"the server of {name} did not say where it listens.") from None
    except BaseException:
        await _ended(process)
        raise
    return Child(process, Endpoint(f"http://127.0.0.1:{port}", name, key), folder)


async def _process(*arguments: str, log: IO[bytes], **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        env={**os.environ, **environment, **child_of_this()},
        start_new_session=True,
    )


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end, and see to it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _last_words(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].removeprefix("Error: ")[:500] if lines else "a command of ours failed without a word."
