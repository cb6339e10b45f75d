"""Nodes of one run: a candidate of one is tried by all, its claim is checked by the others, a lie is taken back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from memory_arenas import HARMS, HELPS, advice, make_arena
from test_verifying import made_up

from shoal.errors import ConfigError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.memory.admission import Decision
from shoal.memory.keeper import Keeper
from shoal.memory.node import MemoryNode
from shoal.memory.trials import Arena
from shoal.protocol.roster import SwarmRole
from shoal.swarm.grants import GrantBook, issue
from shoal.swarm.member import Member, profile

RUN = "memories"
SECRET = b"0123456789abcdef"
AGENT: tuple[SwarmRole, ...] = ("agent",)


async def until(holds: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.05)


async def enter(
    stack: AsyncExitStack, root: Identity, listener: Fabric, folder: Path, model: Path | None
) -> tuple[Keeper, MemoryNode]:
    key = Identity.generate()
    fabric = await stack.enter_async_context(await Fabric.connect(key, listener.ticket(RUN, SECRET)))
    now = time.time()
    grants = GrantBook(RUN, root.public_key)
    grants.merge_grant(issue(root, RUN, key.public_key, AGENT, now, 3600.0), now)
    member = await stack.enter_async_context(
        Member(fabric, RUN, root.public_key, profile(fabric, RUN, AGENT, name=folder.name), grants=grants)
    )
    keeper = stack.enter_context(Keeper(folder, key, vouched_only=True))
    arenas = {"digit": make_arena(model, takes_s=0.002)} if model is not None else {}
    node = MemoryNode(member, keeper, arenas, share_every_s=0.2, every_s=0.2, lease_s=5.0)
    return keeper, await stack.enter_async_context(node)


async def test_three_nodes_try_share_check_and_catch(tiny_model: Path, tmp_path: Path) -> None:
    root = Identity.generate()
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await Fabric.listen(root))
        first, _ = await enter(stack, root, listener, tmp_path / "a", tiny_model)
        second, checking = await enter(stack, root, listener, tmp_path / "b", tiny_model)
        # The third runs no trials, and lies.
        third, idle = await enter(stack, root, listener, tmp_path / "c", None)
        good = first.add(advice(HELPS)).id
        bad = made_up(third, advice(HARMS))
        await until(lambda: first.memory(good).status == "active")
        await until(lambda: second.store.memory(good) and second.store.node in second.memory(good).vouched)
        await until(lambda: any(words.startswith("false") for words in checking.checked.values()))
        await until(lambda: third.memory(bad).status == first.memory(bad).status == "candidate")
        assert [one.memory.id for one in second.search("reply")] == [good]
        assert not third.search("reply") and idle.replayer is None
        assert first.store.node in first.memory(good).vouched


async def test_a_candidate_that_cannot_be_tried_is_left_for_later(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cannot(entry: str, arena: Arena) -> Decision:
        tried.append(entry)
        raise ConfigError("the world has one task.", "It has no siblings.")

    tried: list[str] = []
    root = Identity.generate()
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await Fabric.listen(root))
        keeper, node = await enter(stack, root, listener, tmp_path / "a", tiny_model)
        monkeypatch.setattr(node.desk, "admit", cannot)
        entry = keeper.add(advice(HELPS)).id
        await until(lambda: tried)
        await asyncio.sleep(0.7)
        assert tried == [entry]
