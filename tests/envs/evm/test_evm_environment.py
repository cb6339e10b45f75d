"""Quests as an environment: seeded, replayable, and never upset by what an agent writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.envs.evm.actions import write_action
from shoal.envs.evm.definition import COMPOSITE_GROUPS, GROUPS, shipped_tasks
from shoal.envs.evm.environment import _IDLE, STAGES, EvmQuests
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.selftest import reference
from shoal.envs.registry import make
from shoal.errors import ConfigError, TaskError
from shoal.protocol.episode import Task

GROUP_OF = {name: task.group for name, task in shipped_tasks().items()}


def solution(task: Task) -> list[str]:
    instance = sample(shipped_tasks()[task.id.partition("/")[0]], task.seed)
    actions, _ = reference(instance, PyrevmChain())
    return [write_action(action) for action in actions]


def test_tasks_are_pure_and_the_sides_disjoint() -> None:
    env = make("evm", name="quests")
    train = [env.task("train", i, 1) for i in range(500)]
    assert train == [env.fresh().task("train", i, 1) for i in range(500)]
    assert len({task.id.partition("/")[0] for task in train}) > 95
    heldout = env.heldout(214)
    assert len({task.id for task in heldout}) == 214
    assert {task.id.partition("/")[0] for task in heldout} == shipped_tasks().keys()
    assert {task.seed for task in heldout}.isdisjoint(task.seed for task in train)


async def test_solutions_earn_one_and_replay_to_the_same() -> None:
    env = make("evm", {"tasks": ["erc20_transfer_fixed", "composite_query_bnb_transfer_verify"]})
    for task in env.heldout(4):
        actions = solution(task)
        await env.reset(task)
        for action in actions[:-1]:
            step = await env.step(action)
            assert not step.done and step.observation
        step = await env.step(actions[-1])
        if not step.done:
            step = await env.step('{"action": "submit"}')
            actions.append('{"action": "submit"}')
        assert (step.reward, step.done, step.info["lenient"]) == (1.0, True, 1.0)
        assert (await env.score(task, actions)).reward == 1.0


async def test_a_composite_quest_ends_after_three_failures_or_twice_the_steps() -> None:
    env = make("evm", {"tasks": ["composite_wrap_unwrap_cycle"]})
    task = env.task("heldout", 0, 0)
    await env.reset(task)
    assert [(await env.step("nonsense")).done for _ in range(3)] == [False, False, True]
    await env.reset(task)
    look = '{"action": "query", "calls": {"b": {"function": "eth_blockNumber"}}}'
    assert [(await env.step(look)).done for _ in range(4)] == [False, False, False, True]
    with pytest.raises(TaskError):
        await env.step(look)


async def test_what_goes_wrong_is_told() -> None:
    env = make("evm", {"tasks": ["composite_approve_stake_tokens"]})
    await env.reset(env.task("heldout", 0, 0))
    deposit = {"action": "send", "to": "staking", "function": "deposit", "args": ["1 ether"]}
    assert "exceeds allowance" in (await env.step(json.dumps(deposit))).observation
    assert "no known name" in (await env.step('{"action": "pay", "to": "Bob", "value": 1}')).observation
    await env.close()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(shipped_tasks())),
    st.lists(
        st.text()
        | st.builds(
            lambda to, function, args: json.dumps({"action": "send", "to": to, "function": function, "args": args}),
            st.sampled_from(["USDT", "WBNB", "router", "reward_pool", "flash_loan", "nft", "me", f"0x{1:040x}"]),
            st.sampled_from(["withdraw", "approve", "harvest", "transfer", "deposit()", "f(bytes)", "burn(address)"]),
            st.lists(st.sampled_from(["me", "1 ether", "0", "router", str(2**256 - 1), "\ud800"]), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
)
async def test_nothing_an_agent_writes_upsets_the_world(name: str, actions: list[str]) -> None:
    env = make("evm", {"tasks": [name]})
    await env.reset(env.task("train", 0, 0))
    for action in actions:
        step = await env.step(action)
        if step.done:
            assert 0 <= step.reward <= 1
            break
    await env.close()
    # The chain that was just given back is as good as new.
    fresh, used = PyrevmChain(), _IDLE[-1]
    agent = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
    assert used.balance(agent) == fresh.balance(agent)
    assert (used.block_number(), used.nonce(agent)) == (fresh.block_number(), fresh.nonce(agent))


async def test_two_episodes_at_once_do_not_meet() -> None:
    env = make("evm", {"tasks": ["bnb_transfer_basic"]})
    first, second = env.fresh(), env.fresh()
    task = env.task("train", 0, 0)
    await first.reset(task)
    await second.reset(task)
    (action,) = solution(task)
    assert (await first.step(action)).reward == 1
    assert (await second.step('{"action": "error"}')).reward == 0


def test_the_curriculum_opens_stage_by_stage() -> None:
    env = make("evm", {"curriculum": 50})
    for stage in range(len(STAGES)):
        allowed = {group for groups in STAGES[: stage + 1] for group in groups}
        drawn = {GROUP_OF[env.task("train", i, 0).id.partition("/")[0]] for i in range(50 * stage, 50 * stage + 50)}
        assert drawn <= allowed
        assert drawn & set(STAGES[stage])
    assert {group for groups in STAGES for group in groups} == {*GROUPS, *COMPOSITE_GROUPS}
    late = make("evm", {"curriculum": 50, "groups": ["swap"]})
    assert GROUP_OF[late.task("train", 0, 0).id.partition("/")[0]] == "swap"


def test_settings_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no group 'nativ'"):
        make("evm", {"groups": ["nativ"]})
    with pytest.raises(TaskError, match="no task 'fly'"):
        make("evm", {"tasks": ["fly"]}).task("train", 0, 0)


async def test_the_brief_prompt_is_one_message() -> None:
    env = EvmQuests(EvmQuests.Settings(prompt="brief", groups=("native",)))  # type: ignore[call-arg]
    opening = await env.reset(env.task("train", 0, 0))
    await env.close()
    assert [message.role for message in opening.messages] == ["user"]
