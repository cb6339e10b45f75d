"""Arithmetic: the splits share no pair, cursors are pure, and grading is strict where it says so."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.envs.arithmetic import LEVELS, canonical, evaluate, is_heldout, pair_key
from shoal.envs.registry import make
from shoal.errors import TaskError
from shoal.protocol.episode import Task

SMALL = st.integers(0, 40)


@given(SMALL, SMALL, st.sampled_from("+*"), st.floats(0.01, 0.99))
def test_mirrored_pairs_are_never_on_both_sides(a: int, b: int, symbol: str, fraction: float) -> None:
    here, there = f"{a} {symbol} {b}", f"{b} {symbol} {a}"
    assert is_heldout(here, fraction) == is_heldout(there, fraction)
    assert canonical(here) == canonical(there) in (here, there)


@given(st.sampled_from(sorted(LEVELS)), st.integers(0, 2**62), st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_training_never_draws_a_heldout_pair_whatever_the_seed(level: str, seed: int, index: int) -> None:
    env = make("arithmetic", {"level": level})
    task = env.task("train", index, seed)
    assert task == env.fresh().task("train", index, seed)
    assert not is_heldout(task.id, 0.4)
    assert evaluate(task.id) >= 0 or level == "chain"


def test_the_default_heldout_set_is_large_distinct_and_has_both_operations() -> None:
    env = make("arithmetic")
    heldout = env.heldout()
    assert len(heldout) >= 200
    assert len({pair_key(task.id) for task in heldout}) == len(heldout)
    for part in (heldout, env.heldout(200)):
        assert min(sum(symbol in task.id for task in part) for symbol in "+*") >= 20
    trained = {pair_key(env.task("train", index, 1).id) for index in range(3000)}
    assert trained.isdisjoint(pair_key(task.id) for task in heldout)
    assert len(trained) > 300


def test_both_orders_of_a_heldout_pair_can_be_asked() -> None:
    one, both = (make("arithmetic", {"heldout_orders": orders}).heldout() for orders in ("one", "both"))
    assert {pair_key(task.id) for task in both} == {pair_key(task.id) for task in one}
    assert {task.id for task in one} < {task.id for task in both}
    assert 1.8 * len(one) < len(both) < 2 * len(one)
    assert len({task.id for task in both}) == len(both)


def test_balance_makes_operations_equally_likely() -> None:
    def share(balance: str) -> float:
        env = make("arithmetic", {"balance": balance})
        return sum("*" in env.task("train", index, 0).id for index in range(1000)) / 1000

    assert share("pairs") < 0.25 < 0.42 < share("operations") < 0.58


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_every_level_holds_out_two_hundred_questions(level: str) -> None:
    assert len(make("arithmetic", {"level": level}).heldout(200)) == 200


@pytest.mark.parametrize(
    ("expression", "value"),
    [("17 + 25", 42), ("7 * 8", 56), ("40 - 13", 27), ("56 / 7", 8), ("12 + 7 - 30", -11), ("0 * 5", 0)],
)
def test_evaluate(expression: str, value: int) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "text", ["", "17", "17+25", "7 / 0", "7 / 2", "1 + 2 * 3", "1 + x", "__import__('os')", "1 + " * 99]
)
def test_a_foreign_task_is_refused(text: str) -> None:
    with pytest.raises(TaskError):
        evaluate(text)


@pytest.mark.parametrize(
    ("reply", "truncated", "strict", "lenient"),
    [
        ("17 + 25 = 42.", False, 1, 1),
        ("**42**", False, 1, 1),
        ("42, I believe", False, 0, 1),
        ("42", True, 0, 1),
        ("42 or 43", False, 0, 0),
        ("forty-two", False, 0, 0),
        ("", False, 0, 0),
    ],
)
async def test_grading(reply: str, truncated: bool, strict: float, lenient: float) -> None:
    task = Task(env="arithmetic", id="17 + 25", seed=0)
    rewards = {"strict": strict, "lenient": lenient, "mixed": (strict + lenient) / 2}
    for mode, reward in rewards.items():
        step = await make("arithmetic", {"reward": mode}).score(task, [reply], truncated=[truncated])
        assert step.done
        assert step.reward == reward
        assert step.info == {"strict": strict, "lenient": lenient}


async def test_what_is_asked() -> None:
    env = make("arithmetic", {"instruction": "Be brief.", "system": "You add.", "times": "times"})
    opening = await env.reset(Task(env="x", id="7 * 8", seed=0))
    assert [(m.role, m.content) for m in opening.messages] == [
        ("system", "You add."),
        ("user", "What is 7 times 8? Be brief."),
    ]
    plain = await make("arithmetic").reset(Task(env="x", id="17 + 25", seed=0))
    assert plain.messages[-1].content == "What is 17 + 25?"
    await env.step("56")
    with pytest.raises(TaskError, match="outside an episode"):
        await env.step("56")


def test_ranges_that_leave_a_split_empty_say_so() -> None:
    env = make("arithmetic", {"add": [3, 3]})
    with pytest.raises(TaskError, match=r"has no (train|heldout) question"):
        env.task("train", 0, 0), env.task("heldout", 0, 0)
    with pytest.raises(TaskError, match="negative"):
        env.task("train", -1, 0)
