"""Nodes that solve problems together: hand-overs, deaths, secrets, weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from collective_nodes import ROOT, Halves, Script, enter, eventually, identity
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.collective.answers import canonical, is_right
from shoal.agents.collective.baselines import central, direct, majority, self_consistency
from shoal.agents.collective.commissions import checked
from shoal.agents.collective.executor import offer_to
from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.sharing import OwnEntries
from shoal.agents.collective.work import NoChain, PlannedStep, StepFailed, SubTask, Work
from shoal.errors import ModelError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.protocol.codec import to_json
from shoal.protocol.collective import Place, Take
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Contribution, LedgerPage


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.fixture
async def listener() -> AsyncIterator[Fabric]:
    async with await Fabric.listen(ROOT) as fabric:
        yield fabric


def here(*nodes: CollectiveNode) -> bool:
    """Whether all of them see each other."""
    return all(node.num_peers == len(nodes) - 1 for node in nodes)


def equals(right: str, result: str) -> float:
    return float(result == right)


async def test_a_problem_is_solved_step_by_step_and_nobody_reads_more_than_its_part(
    stack: AsyncExitStack, listener: Fabric
) -> None:
    poser = await enter(stack, listener, "poser", None)
    product, total = Script({"product": 1.0}), Script({"sum": 1.0})
    nodes = [
        poser,
        await enter(stack, listener, "ann", product, Halves(), slots=64),
        await enter(stack, listener, "bob", total, Halves(), slots=64),
    ]
    await eventually(lambda: here(*nodes))
    found = await poser.solve("(6 * 7) + 8", planners=2, timeout_s=30.0)
    assert found.answer == "50" and found.support == 1.0 and len(found.chains) == 2
    ann, bob = identity("ann").node_id, identity("bob").node_id
    assert {chain.planner for chain in found.chains} == {ann, bob}
    assert all(chain.executors == (ann, bob) for chain in found.chains)
    assert {task.task for task in product.told} == {"6 * 7"} and all(not task.needed for task in product.told)
    assert {(task.task, tuple(task.needed.items())) for task in total.told} == {("$0 + 8", ((0, "42"),))}

    # What planners say of executors reaches everybody's ledger.
    await eventually(lambda: len({node.ledger.root for node in nodes}) == 1 and len(nodes[0].ledger.signers) == 2)
    said = [entry.what for _, entry in poser.ledger.entries()]
    assert all(isinstance(one, Contribution) and one.delivery == "delivered" for one in said) and len(said) == 2


async def test_a_step_goes_to_the_next_when_its_executor_dies_or_fails(stack: AsyncExitStack, listener: Fabric) -> None:
    planner = await enter(stack, listener, "planner", None, Halves())
    dying = AsyncExitStack()
    slow = Script({"product": 1.0, "sum": 1.0}, takes_s=60.0)
    victim = await enter(dying, listener, "victim", slow)
    bad = await enter(stack, listener, "bad", Script({"product": 0.9, "sum": 0.9}, fails=True))
    good = await enter(stack, listener, "good", Script({"product": 0.1, "sum": 0.1}))
    poser = await enter(stack, listener, "poser", Script(fails=True), Halves())
    await eventually(lambda: here(planner, victim, bad, good, poser))
    solving = asyncio.create_task(poser.solve("(6 * 7) + 8", planners=1, timeout_s=60.0))
    await eventually(lambda: slow.told)
    await dying.aclose()
    found = await solving
    assert found.answer == "50"
    assert [chain.executors for chain in found.chains if chain.answer] == [(identity("good").node_id,) * 2]

    def standing(name: str) -> float:
        return poser.tally().standing(identity(name).public_key)

    await eventually(lambda: standing("victim") < 1.0 and standing("bad") < 1.0)
    assert standing("good") == 1.0


async def test_a_step_that_an_expert_cannot_do_at_all_has_failed_at_once(
    stack: AsyncExitStack, listener: Fabric
) -> None:
    """Whatever the reason: the lease is not waited for."""

    class Broken(Script):
        async def act(self, task: SubTask) -> Work:
            raise ModelError("the template takes no system message.")

    poser = await enter(stack, listener, "poser", None)
    broken = await enter(stack, listener, "broken", Broken({"product": 0.9, "sum": 0.9}))
    good = await enter(stack, listener, "good", Script({"product": 0.1, "sum": 0.1}), Halves(), slots=4, lease_s=30.0)
    await eventually(lambda: here(poser, broken, good))
    found = await poser.solve("(6 * 7) + 8", planners=1, timeout_s=20.0)
    assert found.answer == "50" and found.chains[0].executors == (good.id, good.id)


@pytest.mark.parametrize("task", ["", "  ", "x" * 16_001])
@pytest.mark.parametrize("requirement", [True, False])
def test_a_chain_with_a_step_that_nobody_could_be_told_is_none(task: str, requirement: bool) -> None:
    step = PlannedStep(task, "6 * 7") if requirement else PlannedStep("a product", task)
    with pytest.raises(NoChain, match="step 1"):
        checked([step])


async def test_who_answers_nonsense_has_not_taken_the_step() -> None:
    class Nonsense:
        async def request(self, *_: object, **__: object) -> bytes:
            return b"\xc1"

    key = identity("liar").public_key
    take = Take(place=Place("0" * 32, "0" * 32, 0), planner=key, lease_s=1.0)
    assert not await offer_to(Nonsense(), key, take)  # type: ignore[arg-type]


async def test_calibration_finds_who_lies_and_the_vote_believes_the_others(
    stack: AsyncExitStack, listener: Fabric
) -> None:
    liars = [await enter(stack, listener, f"liar{n}", Script({"sum": 1.0, "product": 1.0}, lies=True)) for n in (0, 1)]
    honest = [await enter(stack, listener, f"honest{n}", Script(), Halves(), slots=4) for n in (0, 1, 2)]
    nodes = [*liars, *honest]
    await eventually(lambda: here(*nodes))
    for attester in honest:
        for subject in nodes:
            if subject is attester:
                continue
            for skill, words, right in (("sum", "2 + 2", "4"), ("product", "3 * 5", "15")):
                task = Task(env="sums", id=words, seed=0)
                key = subject._fabric.identity.public_key
                score = await attester.calibrate(key, skill, task, words, partial(equals, right))
                assert score == float(subject not in liars)
    await eventually(lambda: len({node.ledger.root for node in nodes}) == 1)
    tally = honest[0].tally()
    weights = {node: tally.capability(node._fabric.identity.public_key, "sum").mean for node in nodes}
    assert max(weights[node] for node in liars) < 0.3 < min(weights[node] for node in honest)
    found = await liars[0].solve("(6 * 7) + 8", planners=3, timeout_s=60.0)
    assert found.answer == "50", "even a liar that asks is told the truth"


async def test_what_nobody_can_plan_or_do_ends_with_reasons(stack: AsyncExitStack, listener: Fabric) -> None:
    poser = await enter(stack, listener, "poser", None)
    only = await enter(stack, listener, "only", Script(fails=True), Halves())
    await eventually(lambda: here(poser, only))
    found = await poser.solve("what is love?", planners=1, timeout_s=1.5)
    assert found.answer is None and {chain.reason for chain in found.chains} == {"that is no sum."}
    found = await poser.solve("(6 * 7) + 8", planners=1, timeout_s=2.0)
    assert found.answer is None and found.seconds < 10


async def test_what_a_chain_was_worth_reaches_those_who_took_part(stack: AsyncExitStack, listener: Fabric) -> None:
    steps: list[tuple[int, str, float | None]] = []
    plans: list[float | None] = []
    seen: list[int] = []
    poser = await enter(stack, listener, "poser", None)
    inner = await stack.enter_async_context(AsyncExitStack())
    only = await enter(
        inner,
        listener,
        "only",
        Script(takes_s=1.2),
        Halves(),
        slots=8,
        on_work=lambda place, work, score: steps.append((place.step, work.result, score)),
        on_plan=lambda chain, plan, score: plans.append(score),
    )
    await eventually(lambda: here(poser, only))
    found = await poser.solve(
        "(6 * 7) + 8",
        planners=1,
        timeout_s=60.0,
        score=lambda answer: 0.25,
        on_progress=lambda chain, planner, views: seen.append(sum(bool(view.result) for view in views)),
    )
    (chain,) = found.chains
    assert [(view.requirement, view.result) for view in chain.steps] == [("a product", "42"), ("a sum", "50")]
    assert chain.tokens == found.tokens == len("6 * 7") + len("42 + 8") and seen[-1] == 2 and min(seen) < 2
    await poser.told()
    assert sorted(steps) == [(0, "42", 0.25), (1, "50", 0.25)] and plans == [0.25]

    # Nobody says what a chain is worth that its poser does not wait for.
    await poser.solve("(6 * 7) + 8", planners=1, timeout_s=1.6)
    await eventually(lambda: only.executor.done >= 3)
    await inner.aclose()
    assert steps[2:] and {score for _, _, score in steps[2:]} == {None}


async def test_an_identity_that_comes_back_goes_on_with_what_it_said(
    stack: AsyncExitStack, listener: Fabric, tmp_path: Path
) -> None:
    poser = await enter(stack, listener, "poser", None)
    first = await enter(stack, listener, "first", Script(), Halves(), slots=4)
    kept = tmp_path / "said.jsonl"
    for life in (1, 2):
        async with AsyncExitStack() as inner:
            again = await enter(inner, listener, "again", None, Halves(), own=OwnEntries(kept))
            await eventually(lambda: here(poser, first, again))  # noqa: B023
            task = Task(env="sums", id=f"t{life}", seed=0)
            key = identity("first").public_key
            assert await again.calibrate(key, "sum", task, "2 + 2", partial(equals, "4")) == 1.0
            await eventually(lambda: poser.tally().capability(key, "sum").trials == life)  # noqa: B023
        await eventually(lambda: here(poser, first))
    assert not poser.ledger.convicted and len(list(OwnEntries(kept))) == 4
    with kept.open("ab") as file:
        file.write(b'{"entries"')  # a writer that was killed
    assert len(list(OwnEntries(kept))) == 4 and kept.read_bytes().endswith(b"\n")
    kept.write_text("nonsense\n")
    with pytest.raises(StorageError, match="contradict"):
        OwnEntries(kept)


def test_what_was_said_is_never_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it reads what it said must not have forgotten half of it."""

    def no(*_: object) -> int:
        raise AssertionError("the file is written anew")

    kept = tmp_path / "said.jsonl"
    page = to_json(LedgerPage(entries=())) + b"\n"
    kept.write_bytes(2 * page + page[:5])
    monkeypatch.setattr(Path, "write_bytes", no)
    OwnEntries(kept)
    assert kept.read_bytes() == 2 * page


async def test_a_central_scheduler_gives_every_step_away_itself(stack: AsyncExitStack, listener: Fabric) -> None:
    poser = await enter(stack, listener, "poser", None)
    product, total = Script({"product": 1.0}), Script({"sum": 1.0})
    nodes = [poser, await enter(stack, listener, "ann", product), await enter(stack, listener, "bob", total)]
    await eventually(lambda: here(*nodes))
    found = await central(poser, Halves(), "(6 * 7) + 8", [], 30.0)
    assert found.answer == "50" and found.tokens > 0 and not found.reason
    assert [(task.task, task.needed) for task in (*product.told, *total.told)] == [("6 * 7", {}), ("$0 + 8", {0: "42"})]
    lost = await central(poser, Halves(), "what is love?", [], 30.0)
    assert lost.answer is None and lost.reason == "that is no sum."


async def test_one_model_is_asked_as_often_as_tokens_allow() -> None:
    class Wavering:
        claims: Mapping[str, float] = {}
        said = 0

        async def act(self, task: SubTask) -> Work:
            self.said += 1
            if self.said == 2:
                raise StepFailed("not today.")
            return Work("7" if self.said % 3 else "8", tokens=10)

    tried = await self_consistency(Wavering(), "which?", 100)
    assert (tried.answer, tried.samples, tried.tokens) == ("7", 10, 90)
    once = await direct(Wavering(), "which?")
    assert (once.answer, once.tokens) == ("7", 10)
    assert majority(["The 7", "8", "8.0"]) == "8" and majority(["...", ""]) is None


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The sum is 31.", "31", True),
        ("31 or 32", "31", False),
        ("fifty-six", "Fifty-six.", True),
        ("I would say (B), not (A)", "(A)", True),
        ("(C) red", "(c)", True),
        ("C", "(C)", True),
        ("red", "(C)", False),
        (None, "1", False),
    ],
)
def test_whether_an_answer_is_the_known_one(answer: str | None, truth: str, right: bool) -> None:
    assert is_right(answer, truth) == right


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("1,000.0", "1000"),
        (" $12.50. ", "12.5"),
        ("6/8", "0.75"),
        ("2/6", "1/3"),
        ("-0.125", "-0.125"),
        ("1/8", "0.125"),
        ("(B)", "b"),
        ("b.", "b"),
        ("The Arle.", "arle"),
        ("  two   words ", "two words"),
        ("５", "5"),
        ("...", None),
        ("", None),
        ("x" * 3000, None),
    ],
)
def test_answers_that_mean_the_same_are_one(said: str, form: str | None) -> None:
    assert canonical(said) == form


@given(st.text(max_size=60))
def test_a_canonical_answer_stays_as_it_is(text: str) -> None:
    form = canonical(text)
    assert form is None or canonical(form) == form
