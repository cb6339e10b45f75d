"""Who can be talked to in the playground: the models of a server, and any version that a run has kept.

    a server's model   ──▶ that server
    RUN, version V     ──▶ `shoal _version` writes its weights as a checkpoint ──▶ `shoal serve` of it, on loopback

Both are asked through OpenAI's API (`answers`). Invariants: at most `MAX_CHILDREN` servers are kept, those used last;
when the console ends all of them end, and their checkpoints are removed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, ModelError
from shoal.serving.console.answers import Ask, Endpoint, answered
from shoal.serving.console.asked import Server
from shoal.serving.console.children import Child, served, wrote_version

MAX_CHILDREN = 2
"""Two stand side by side."""

MAX_LISTED_VERSIONS = 200

FINAL = "final"
"""What the trained model in a run's folder is called among its versions."""

NEWEST = "newest"
"""The newest published version when it is asked."""

SERVED = "served"
"""The prefix of a server's models among the choices."""


@dataclass
class Voices:
    """The choices, and the servers behind those that were used.

    Args:
        runs: folders of runs, by the names that people see.
        drafters: what `shoal serve --draft` takes, to be offered for versions of runs.
    """

    runs: Mapping[str, Path]
    server: Server | None = None
    drafters: tuple[str, ...] = ()
    _children: OrderedDict[tuple[str, str], Child] = field(default_factory=OrderedDict)
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _scratch: Path | None = None

    def choices(self) -> list[str]:
        """All that can be asked for, the newest versions first."""
        found = [f"{SERVED}/{name}" for name in self.server.models] if self.server is not None else []
        for name, folder in self.runs.items():
            found += [f"{name}@{version}" for version in versions(folder)]
        return found

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """End whatever was started when this ends."""
        try:
            yield
        finally:
            for child in self._children.values():
                await child.end()
            self._children.clear()
            if self._scratch is not None:
                await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    async def say(self, ask: Ask) -> AsyncGenerator[dict[str, Any]]:
        """An answer as it comes: `{"state": …}` while a server starts, `{"text": …}`, and at last `{"done": …}`.

        Raises:
            ShoalError: there is no such model, it can't be served, or it does not answer.
        """
        ask.check()
        if ask.draft and ask.draft not in self.drafters:
            raise ConfigError(f"there is no drafter '{ask.draft[:40]}' here.")
        if (ask.voice, ask.draft) not in self._children and not ask.voice.startswith(f"{SERVED}/"):
            yield {"state": "its weights are put together and a server is started"}
        endpoint, child = await self._endpoint(ask.voice, ask.draft)
        if child is not None:
            child.uses += 1
        try:
            async with aclosing(answered(endpoint, ask)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if child is not None:
                child.uses -= 1

    async def _endpoint(self, voice: str, draft: str) -> tuple[Endpoint, Child | None]:
        kind, _, name = voice.partition("/")
        if kind == SERVED and self.server is not None and name in self.server.models:
            return Endpoint(self.server.url, name, self.server.key), None
        run, _, version = voice.rpartition("@")
        folder = self.runs.get(run)
        known = versions(folder) if folder is not None else []
        if version == NEWEST and version in known:
            version = known[known.index(NEWEST) + 1]
            voice = f"{run}@{version}"
        if folder is None or version not in known:
            raise ModelError(f"there is no model '{voice[:100]}' here (any more).", "Choose another.")
        async with self._starting:
            child = self._children.get((voice, draft))
            if child is not None and child.process.returncode is not None:
                await self._children.pop((voice, draft)).end()
                child = None
            if child is None:
                await self._make_room()
                child = self._children[voice, draft] = await self._started(folder, version, draft)
            self._children.move_to_end((voice, draft))
        return child.endpoint, child

    async def _make_room(self) -> None:
        while len(self._children) >= MAX_CHILDREN:
            idle = [key for key, child in self._children.items() if not child.uses]
            if not idle:
                raise ModelError(f"{MAX_CHILDREN} versions are answering already.", "Wait until one has answered.")
            await self._children.pop(idle[0]).end()

    async def _started(self, folder: Path, version: str, draft: str) -> Child:
        if self._scratch is None:
            self._scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="shoal-console-"))
        made = self._scratch / secrets.token_hex(4)
        made.mkdir()
        model = folder / "model"
        try:
            if version != FINAL:
                await wrote_version(folder, version, made)
                model = made / "model"
            return await served(model, made, f"{folder.name}@{version}", draft)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
            raise


def versions(run: Path) -> list[str]:
    """What a run has kept: its trained model, and published versions, the newest first."""
    found = [FINAL] if (run / "model" / "config.json").is_file() else []
    try:
        with os.scandir(run / "snapshots" / "manifests" / "policy") as entries:
            numbers = [int(entry.name) for entry in entries if entry.name.isdecimal() and len(entry.name) < 19]
    except OSError:
        numbers = []
    found += [NEWEST] if numbers else []
    return found + [str(number) for number in sorted(numbers, reverse=True)[:MAX_LISTED_VERSIONS]]
