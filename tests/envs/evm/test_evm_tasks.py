"""Every task can be solved and cannot be solved wrongly; scores are what the paper and we say."""

from __future__ import annotations

import pytest

from shoal.envs.evm.actions import Pay, Send, Submit
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import read_tasks, shipped_tasks
from shoal.envs.evm.language import LanguageError
from shoal.envs.evm.reference import STRANGER
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.selftest import MIN_MUTANTS, play, reference, selftest

DIGEST = "ad5325d2aca07a5c457c165d43df187ac545da22a6b36442aa09ec2262c780ed"
"""Of instructions, reference actions and verdicts of every task's first two instances."""

QUICK = ("native", "erc20", "nft", "query", "approve", "batch", "nft_bundle")


def test_references_earn_everything_and_are_the_same_everywhere(pyrevm: ChainBackend) -> None:
    found = selftest(shipped_tasks().values(), [pyrevm], seeds=2, mutant_seeds=0)
    assert (found.tasks, found.reference_min, found.weak_references) == (107, 100.0, [])
    assert found.digest == DIGEST


def test_no_mutant_survives_in_the_quick_groups(pyrevm: ChainBackend) -> None:
    chosen = [task for task in shipped_tasks().values() if task.group in QUICK]
    found = selftest(chosen, [pyrevm], seeds=1)
    assert found.surviving == found.generous_no_ops == found.wrong_decay == []
    assert found.fewest_mutants >= MIN_MUTANTS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_holds_on_twenty_instances(pyrevm: ChainBackend) -> None:
    found = selftest(shipped_tasks().values(), [pyrevm], seeds=20, mutant_seeds=2)
    assert found.good, found.summary()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_backends_agree_on_every_run(pyrevm: ChainBackend, anvil: ChainBackend) -> None:
    found = selftest(shipped_tasks().values(), [pyrevm, anvil], seeds=1)
    assert found.good, found.summary()


def test_the_backends_agree_on_a_few(pyrevm: ChainBackend, anvil: ChainBackend) -> None:
    chosen = ["bnb_transfer_max_amount", "erc20_permit", "query_pending_rewards", "composite_unstake_harvest_query"]
    found = selftest([shipped_tasks()[name] for name in chosen], [pyrevm, anvil], seeds=1)
    assert found.good, found.summary()


def test_the_paper_s_score_pays_for_a_reverted_transaction_and_ours_does_not(pyrevm: ChainBackend) -> None:
    instance = sample(shipped_tasks()["composite_approve_stake_tokens"], 0)
    reverting = Send(action="send", to="staking", function="deposit", args=("1 ether",))
    verdict = play(instance, pyrevm, [reverting, Submit(action="submit")])
    assert (verdict.paper, verdict.strict < 20) == (100.0, True)


def test_a_stray_payment_costs_points(pyrevm: ChainBackend) -> None:
    instance = sample(shipped_tasks()["composite_batch_transfer_2_tokens"], 0)
    actions, verdict = reference(instance, pyrevm)
    assert verdict.strict == 100
    stray = play(instance, pyrevm, [*actions, Pay(action="pay", to=STRANGER, value="1")])
    assert stray.points < 100


def test_events_are_compared_by_address_name_and_arguments(pyrevm: ChainBackend) -> None:
    (task,) = read_tasks(
        """
        [[task]]
        id = "events"
        group = "erc20"
        templates = ["a {to}", "b {to}", "c {to}", "d {to}"]
        parameters.to = { kind = "address" }
        solution = ["USDT.transfer(to, 5)"]
        checks.exact = [40, "emitted(USDT.Transfer(me, to, 5)) == 1"]
        checks.any = [20, "emitted(USDT.Transfer(ANY, to, at_least(5)))"]
        checks.amount = [10, "not emitted(USDT.Transfer(me, to, 6))"]
        checks.address = [10, "not emitted(BUSD.Transfer(me, to, 5))"]
        checks.recipient = [10, "not emitted(USDT.Transfer(me, whale, 5))"]
        checks.event = [10, "not emitted(USDT.Approval(me, to, 5))"]
        """,
        "here",
    )
    assert reference(sample(task, 0), pyrevm)[1].points == 100


@pytest.mark.parametrize(
    "that",
    ["was()", "only('gold')", "asked(fly())", "emitted(USDT.Flown(me))", "sent(USDT.fly())", "answered(1)", "gain()"],
)
def test_a_check_that_means_nothing_is_said_to(pyrevm: ChainBackend, that: str) -> None:
    (task,) = read_tasks(
        f"""
        [[task]]
        id = "odd"
        group = "native"
        templates = ["a", "b", "c", "d"]
        solution = ["pay(whale, 1)"]
        checks.odd = [100, "{that}"]
        """,
        "here",
    )
    with pytest.raises(LanguageError):
        reference(sample(task, 0), pyrevm)


def test_a_weak_check_is_found(pyrevm: ChainBackend) -> None:
    (weak,) = read_tasks(
        """
        [[task]]
        id = "weak"
        group = "native"
        templates = ["a {to}", "b {to}", "c {to}", "d {to}"]
        parameters.to = { kind = "address" }
        solution = ["pay(to, ether)"]
        checks.any = [100, "count() == 1"]
        """,
        "here",
    )
    found = selftest([weak], [pyrevm], seeds=1)
    assert found.surviving and not found.good


def test_a_wrong_reference_is_found(pyrevm: ChainBackend) -> None:
    (wrong,) = read_tasks(
        """
        [[task]]
        id = "wrong"
        group = "native"
        templates = ["a {to}", "b {to}", "c {to}", "d {to}"]
        parameters.to = { kind = "address" }
        solution = ["pay(to, ether)"]
        checks.all = [100, "gain(bnb(to)) == 2 * ether"]
        """,
        "here",
    )
    found = selftest([wrong], [pyrevm], seeds=1)
    assert (found.reference_min, found.good) == (0.0, False)
