"""Events about what has changed: nothing is missed, whatever a page has seen last."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import CapacityError
from shoal.serving.console import live as module
from shoal.serving.console.live import Live

VIEWS = ("a", "b", "c")


@given(st.lists(st.sets(st.sampled_from(VIEWS)), max_size=12), st.integers(0, 12))
def test_a_page_hears_of_all_that_changed_since(changes: list[set[str]], seen: int) -> None:
    live = Live(VIEWS)
    last, missed = live.now, set[str]()
    for number, views in enumerate(changes):
        live.touch(*views)
        missed |= views
        if number + 1 == seen:
            last, missed = live.now, set()
    assert set(live.since(last)) == missed


@pytest.mark.parametrize("last", ["", "0-0", "nonsense", "-5", "abc-xyz", "\u0664-\u0664"])
def test_another_life_is_told_of_everything(last: str) -> None:
    live = Live(VIEWS)
    live.touch("a")
    assert live.since(last) == list(VIEWS)


async def test_events_come_as_things_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    live = Live(VIEWS)
    async with aclosing(live.frames(live.now)) as frames:
        assert (await anext(frames)).startswith(b"retry: ")
        first = await anext(frames)
        assert f"id: {live.now}".encode() in first
        assert b'{"views":[]}' in first
        assert await anext(frames) == b": still here\n\n"
        live.touch("b", "c")
        told = b""
        while b"data" not in told:
            told = await anext(frames)
        assert b'{"views":["b","c"]}' in told
        assert live.num_watchers == 1
        asyncio.get_running_loop().call_later(0.01, live.close)
        assert [frame async for frame in frames if b"data" in frame] == []
    assert live.num_watchers == 0


async def test_no_more_than_so_many_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WATCHERS", 1)
    live = Live(VIEWS)
    async with aclosing(live.frames("")) as first, aclosing(live.frames("")) as second:
        await anext(first)
        with pytest.raises(CapacityError):
            await anext(second)
    assert live.num_watchers == 0
