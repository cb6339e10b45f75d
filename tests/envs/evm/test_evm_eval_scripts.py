"""Quests played by scripts: what the evaluation makes of a model that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.evaluation import Manner, Mode, Played, instance, play
from shoal.envs.evm.prompts import opening
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.scripts import Language, ScriptRunner
from shoal.envs.evm.scripts.reference import write_script
from shoal.envs.evm.selftest import reference
from shoal.envs.evm.speakers import Reply
from shoal.errors import ShoalError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Grammar

TASKS = ("bnb_transfer_basic", "query_current_block_number", "composite_query_erc20_transfer_verify")


@dataclass
class Script:
    """A model that says what it was given, one line a turn."""

    lines: Sequence[str]

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        number = sum(message.role == "assistant" for message in messages)
        return Reply(self.lines[number], "stop", 1, 1, 0.0)


def blocks(name: str, language: Language) -> list[str]:
    actions, _ = reference(instance(shipped_tasks()[name], 0, 0), PyrevmChain())
    return [f"```{language}\n{write_script(action, language)}\n```" for action in actions]  # type: ignore[arg-type]


async def played(runner: ScriptRunner, name: str, lines: Sequence[str], mode: Mode) -> Played:
    manner = Manner(runner.language, mode, runner=runner)
    return await play(instance(shipped_tasks()[name], 0, 0), 0, Script(lines), manner, PyrevmChain())


@pytest.mark.parametrize("language", ["python", pytest.param("typescript", marks=pytest.mark.slow)])
async def test_scripts_earn_what_typed_actions_do(language: Language) -> None:
    runner = ScriptRunner(language)
    try:
        await runner.__aenter__()
    except ShoalError as error:
        pytest.skip(f"scripts cannot be run here: {error}")
    try:
        for name in TASKS:
            lines = blocks(name, language)
            step_by_step = await played(runner, name, [*lines, 'Done. {"action": "submit"}'], "multi")
            at_once = await played(runner, name, ["First this:\n" + "\nthen\n".join(lines)], "naive")
            assert step_by_step.strict == at_once.strict == 100, name
            assert len(at_once.turns) == 1 and len(at_once.turns[0].acts) == len(lines)
        (transfer,) = (act for act in at_once.turns[0].acts if act.call)
        assert transfer.success and transfer.call.startswith("USDT.transfer(")
        words = await played(runner, "composite_query_erc20_transfer_verify", ["I am not sure."] * 3, "multi")
        assert words.ending == "out of attempts" and words.points < 20
        assert f"no {language} block" in words.turns[0].acts[0].feedback
    finally:
        await runner.__aexit__(None, None, None)


@pytest.mark.parametrize("language", ["python", "typescript"])
def test_prompts_hold_what_a_script_needs(language: Language) -> None:
    quest = Quest(instance(shipped_tasks()["composite_approve_stake_tokens"], 0, 0), PyrevmChain())
    quest.begin()
    system, user = opening(quest, language)
    assert "0x10ED43C718714eb63d5aA57B78B54704E256024E" in system.content, "addresses"
    assert "function approve(address spender, uint256 value) returns (bool)" in system.content, "interfaces"
    assert {"python": "execute_skill", "typescript": "executeSkill"}[language] in system.content
    assert quest.instance.instruction in user.content and '{"action": "submit"}' in user.content
    assert "submit" not in opening(quest, language, one_shot=True)[1].content
    quest.end()
