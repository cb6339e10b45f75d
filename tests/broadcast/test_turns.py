"""Turns: bounded, in order of rank, never lost."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from shoal.broadcast.turns import Turns


async def test_the_lowest_rank_goes_first() -> None:
    turns, order = Turns(1), []

    async def go(rank: float) -> None:
        async with turns.turn(rank):
            order.append(rank)

    async with turns.turn(0.0):
        assert turns.all_taken
        tasks = [asyncio.create_task(go(rank)) for rank in (0.5, 0.1, 0.9, 0.3)]
        await asyncio.sleep(0)
        assert order == []
    await asyncio.gather(*tasks)
    assert order == [0.1, 0.3, 0.5, 0.9] and not turns.all_taken


@given(st.integers(1, 4), st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30), st.integers())
def test_no_turn_is_lost_or_made_up(number: int, callers: list[tuple[float, bool]], seed: int) -> None:
    """Callers that are cancelled, at any moment, and callers that fail."""

    async def play() -> None:
        turns, chance, inside = Turns(number), random.Random(seed), 0

        async def go(rank: float, fails: bool) -> None:
            nonlocal inside
            async with turns.turn(rank):
                inside += 1
                assert inside <= number
                try:
                    for _ in range(chance.randrange(3)):
                        await asyncio.sleep(0)
                    assert not fails
                finally:
                    inside -= 1

        tasks = [asyncio.create_task(go(*caller)) for caller in callers]
        for task in tasks:
            if chance.random() < 0.3:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task, (_, fails) in zip(tasks, callers, strict=True):
            assert task.cancelled() or (task.exception() is not None) == fails
        assert turns._free == number and not turns.all_taken

    asyncio.run(play())
