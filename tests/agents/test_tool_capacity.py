from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.agents.tools.capacity import TOTAL, Capacity, Slot

TOOLS, RUNS = ("a", "b", "c"), ("run:1", "run:2")
Step = tuple[str, str, str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "cancel", "release"]),
        st.sampled_from(TOOLS),
        st.sampled_from(RUNS),
        st.integers(0, 50),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(steps, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_nothing_asked_or_cancelled_ever_exceeds_a_limit_or_loses_a_slot(
    script: list[Step], per_tool: int, per_run: int, total: int
) -> None:
    async def play() -> None:
        capacity = Capacity(total)
        for name in TOOLS:
            capacity.limit(name, per_tool)
        for name in RUNS:
            capacity.limit(name, per_run)
        waiting: list[asyncio.Task[Slot]] = []
        held: list[Slot] = []
        for what, tool, run, which in script:
            if what == "take":
                waiting.append(asyncio.create_task(capacity.take(tool, run)))
            elif what == "cancel" and waiting:
                waiting.pop(which % len(waiting)).cancel()
            elif what == "release" and held:
                held.pop(which % len(held)).release()
            if which % 3:  # Otherwise several things happen in the same moment.
                await asyncio.sleep(0)
            held += [task.result() for task in waiting if task.done() and not task.cancelled()]
            waiting = [task for task in waiting if not task.done()]
            assert capacity.taken() <= total
            assert all(capacity.taken(tool) <= per_tool for tool in TOOLS)
            assert all(capacity.taken(run) <= per_run for run in RUNS)
        # Whoever still waits is served once the others have gone.
        while held or waiting:
            for slot in held:
                slot.release()
                slot.release()
            held = []
            async with asyncio.timeout(5):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            held += [task.result() for task in waiting if task.done()]
            waiting = [task for task in waiting if not task.done()]
        await asyncio.sleep(0)  # whoever was cancelled last gives back what it was granted in the same moment
        assert capacity.taken(TOTAL) == 0
        assert capacity.exceeded == 0

    asyncio.run(play())


async def test_a_call_that_waits_for_a_busy_tool_keeps_nothing_from_others() -> None:
    capacity = Capacity(10)
    capacity.limit("slow", 1)
    capacity.limit("run:1", 3)
    first = await capacity.take("slow", "run:1")
    queued = [asyncio.create_task(capacity.take("slow", "run:1")) for _ in range(5)]
    await asyncio.sleep(0)
    quick = capacity.take_at_once("quick", "run:1")
    assert quick is not None
    first.release()
    await asyncio.sleep(0)
    assert [task.done() for task in queued] == [True, False, False, False, False]
    for task in queued:
        if task.done():
            task.result().release()
        else:
            task.cancel()
    await asyncio.gather(*queued, return_exceptions=True)
    quick.release()
    assert capacity.taken() == 0


async def test_calls_of_one_tool_are_served_in_order() -> None:
    capacity = Capacity(1)
    first = await capacity.take("a", "run:1")
    order: list[int] = []

    async def one(number: int) -> None:
        slot = await capacity.take("a" if number % 2 else "b", "run:1")
        order.append(number)
        slot.release()

    tasks = [asyncio.create_task(one(number)) for number in range(20)]
    await asyncio.sleep(0)
    first.release()
    await asyncio.gather(*tasks)
    assert order == list(range(20))
