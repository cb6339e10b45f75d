"""Nodes of a collective that are slow, busy, or cut off for a while: nothing that was done is lost for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest
from collective_nodes import ROOT, RUN, SECRET, Halves, Script, enter, eventually, granted, identity
from msgspec.structs import replace

from shoal.agents.collective.chain import Chain
from shoal.agents.collective.executor import brief_key, digest, report_key, take_key
from shoal.agents.collective.work import NoChain, Plan, PlannedStep
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request
from shoal.lab.network import Network, Node
from shoal.lab.proxy import ProxyLab
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import Brief, Briefing, Report, Reported, StepDone, Take, Taken
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Contribution
from shoal.swarm.signing import sign

PROBLEM = "(6 * 7) + 8"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.fixture
async def listener() -> AsyncIterator[Fabric]:
    async with await Fabric.listen(ROOT) as fabric:
        yield fabric


class Hesitant(Halves):
    """Writes no chain while it is told to wait, then none the first time."""

    def __init__(self) -> None:
        self.asked = 0
        self.goes_on = asyncio.Event()

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        self.asked += 1
        if self.asked == 1:
            await self.goes_on.wait()
            raise NoChain("not yet.")
        return await super().write(problem, skills)


class Once(Halves):
    """Writes one chain and no other."""

    asked = 0

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        self.asked += 1
        if self.asked > 1:
            raise NoChain("one is enough.")
        return await super().write(problem, skills)


def stand_still(seconds: float) -> None:
    """As a process does that does not get its turn."""
    time.sleep(seconds)


async def test_a_problem_is_not_given_up_because_nobody_is_free_just_now(
    stack: AsyncExitStack, listener: Fabric
) -> None:
    script, writer = Script(takes_s=2.0), Hesitant()
    poser = await enter(stack, listener, "poser", None)
    other = await enter(stack, listener, "other", None)
    only = await enter(stack, listener, "only", script, writer, slots=1)
    await eventually(lambda: poser.num_peers == other.num_peers == only.num_peers == 2)
    solving = asyncio.create_task(poser.solve(PROBLEM, planners=1, timeout_s=60.0))
    await eventually(lambda: writer.asked)
    task = Task(env="sums", id="busy", seed=0)
    key = identity("only").public_key
    keeping_busy = asyncio.create_task(other.calibrate(key, "sum", task, "2 + 2", lambda said: float(said == "4")))
    await eventually(lambda: script.told)
    writer.goes_on.set()
    found = await solving
    assert found.answer == "50" and [chain.reason for chain in found.chains if not chain.answer] == ["not yet."]
    assert await keeping_busy == 1.0


@pytest.mark.slow
async def test_a_lease_outlives_a_planner_that_stood_still(stack: AsyncExitStack, listener: Fabric) -> None:
    script = Script({"product": 1.0, "sum": 1.0}, takes_s=1.0)
    poser = await enter(stack, listener, "poser", Script(fails=True), Halves(), slots=4, lease_s=6.0)
    only = await enter(stack, listener, "only", script, slots=4)
    await eventually(lambda: poser.num_peers == only.num_peers == 1)
    solving = asyncio.create_task(poser.solve(PROBLEM, planners=1, timeout_s=90.0))
    await eventually(lambda: script.told)
    stand_still(7.5)
    found = await solving
    assert found.answer == "50"
    said = [entry.what for _, entry in poser.ledger.entries()]
    assert [one.delivery for one in said if isinstance(one, Contribution)] == ["delivered", "delivered"]


async def test_a_result_that_is_brought_again_is_taken_once_and_welcome(
    stack: AsyncExitStack, listener: Fabric
) -> None:
    """Its first answer may have been lost on the way."""
    planner = await enter(stack, listener, "planner", None)
    bare = (await granted(stack, "bare", listener.ticket(RUN, SECRET))).fabric
    stranger = (await granted(stack, "stranger", listener.ticket(RUN, SECRET))).fabric
    takes: list[Take] = []

    async def take(request: Request) -> bytes:
        takes.append(decode(request.body, Take, max_bytes=4096))
        return encode(Taken(accepted=True))

    await bare.serve(take_key(bare.identity.node_id), take, max_bytes=4096, allow=None)
    await eventually(lambda: planner.num_peers == 2)
    planned = [PlannedStep("a sum", "2 + 2"), PlannedStep("a sum", "$0 + 1", needs=(0,))]
    chain = Chain("0" * 16, "1" * 16, planned, time.monotonic() + 60.0)
    running = asyncio.create_task(planner.chains.run(chain, first=bare.identity.public_key))
    await eventually(lambda: takes)
    place, key = takes[0].place, identity("planner").public_key

    async def ask(asker: Fabric, what: str, message: Brief | Report) -> bytes:
        served = {"brief": brief_key, "report": report_key}[what](planner.id)
        return await asker.request(served, encode(message), 10.0, to=key)

    briefing = decode(await ask(bare, "brief", Brief(place=place)), Briefing, max_bytes=4096)
    assert briefing.task == "2 + 2"

    def report(result: str) -> Report:
        done = StepDone(run=RUN, place=place, requirement="a sum", result_hash=digest(result))
        return Report(place=place, result=result, done=sign(bare.identity, done))

    async def goes_on(asker: Fabric, message: Report) -> bool:
        return decode(await ask(asker, "report", message), Reported, max_bytes=4096).goes_on

    assert await goes_on(bare, report("4")) and await goes_on(bare, report("4"))
    assert await goes_on(bare, report("5")) and chain.steps[0].result == "4"
    assert not await goes_on(stranger, report("4"))
    said = [entry.what for _, entry in planner.ledger.entries()]
    assert [one.step for one in said if isinstance(one, Contribution)] == [0]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.slow
async def test_what_a_planner_that_was_cut_off_brings_after_all_counts(stack: AsyncExitStack, listener: Fabric) -> None:
    lab = await stack.enter_async_context(ProxyLab(Network(nodes=(Node(name="near"), Node(name="far")))))
    host, port = await lab.relay("far", "near", int(listener.endpoints[0].rpartition(":")[2]))
    ticket = replace(listener.ticket(RUN, SECRET), endpoints=(f"tcp/{host}:{port}",))
    script, writer = Script(takes_s=2.0), Once()
    poser = await enter(stack, listener, "poser", None)
    far = await enter(stack, listener, "far", script, writer, ticket, slots=4)
    await eventually(lambda: poser.num_peers == far.num_peers == 1)
    solving = asyncio.create_task(poser.solve(PROBLEM, planners=1, timeout_s=90.0))
    await eventually(lambda: script.told)
    await lab.partition(("near",), ("far",))
    await eventually(lambda: poser.num_peers == 0, within_s=60.0)
    await asyncio.sleep(8.0)  # Long enough to be given up.
    await lab.heal()
    found = await solving
    assert found.answer == "50" and sum(chain.answer is not None for chain in found.chains) == 1


@pytest.mark.slow
async def test_a_planner_that_is_gone_is_replaced(stack: AsyncExitStack, listener: Fabric) -> None:
    script = Script({"product": 1.0, "sum": 1.0}, takes_s=2.0)
    poser = await enter(stack, listener, "poser", None)
    await enter(stack, listener, "worker", script, slots=8)
    dying = AsyncExitStack()
    await enter(dying, listener, "first", Script(fails=True), Halves())
    await eventually(lambda: poser.num_peers == 2)
    solving = asyncio.create_task(poser.solve(PROBLEM, planners=1, timeout_s=90.0))
    await eventually(lambda: script.told)
    second = await enter(stack, listener, "second", Script(fails=True), Halves())
    await eventually(lambda: poser.num_peers == second.num_peers == 3)
    await dying.aclose()
    found = await solving
    assert found.answer == "50"
    assert {chain.planner: chain.reason for chain in found.chains} == {
        identity("first").node_id: "its planner fell silent",
        identity("second").node_id: "",
    }
