"""Playing quests with a model, keeping what happened, scoring it and showing it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.envs.evm.actions import write_action
from shoal.envs.evm.definition import Definition, shipped_tasks
from shoal.envs.evm.environment import EvmQuests
from shoal.envs.evm.evaluation import Manner, Mode, Played, instance, play
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.report import page
from shoal.envs.evm.scores import summarise, t_95
from shoal.envs.evm.selftest import reference
from shoal.envs.evm.speakers import ContextFull, Reply
from shoal.errors import NetworkError
from shoal.protocol.chat import Message
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.sampling import Grammar

STAKE = shipped_tasks()["composite_approve_stake_tokens"]
SUBMIT = '{"action": "submit"}'
LOOK = '{"action": "query", "calls": {"b": {"function": "eth_blockNumber"}}}'


@dataclass
class Script:
    """A model that says what it was given, and its last words again when there is no more."""

    lines: Sequence[str]
    heard: list[list[Message]] = field(default_factory=list)
    grammars: list[Grammar | None] = field(default_factory=list)

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        self.heard.append(list(messages))
        self.grammars.append(grammar)
        number = sum(message.role == "assistant" for message in messages)
        return Reply(self.lines[min(number, len(self.lines) - 1)], "stop", 7, 3, 0.25)


def solution(definition: Definition, round_: int = 0) -> list[str]:
    actions, _ = reference(instance(definition, round_, 0), PyrevmChain())
    return [write_action(action) for action in actions]


async def played(name: str, *lines: str, mode: Mode = "multi", round_: int = 0) -> Played:
    manner = Manner("typed", mode)
    return await play(instance(shipped_tasks()[name], round_, 0), round_, Script(lines), manner, PyrevmChain())


@pytest.mark.parametrize("mode", ["multi", "naive"])
async def test_whoever_does_everything_right_has_all_points(mode: Mode) -> None:
    chain = PyrevmChain()
    found = []
    for definition in shipped_tasks().values():
        lines = solution(definition)
        if mode == "naive" and definition.composite:
            lines = [f"My plan:\n```json\n[{', '.join(lines)}]\n```"]
        wanted = instance(definition, 0, 0)
        found.append(await play(wanted, 0, Script([*lines, SUBMIT]), Manner("typed", mode), chain))
    summary = summarise(found, num_tasks=107, rounds=1)
    assert summary["splits"]["total"]["strict"] == summary["maximum"] == 10_700
    assert (summary["splits"]["atomic"]["maximum"], summary["splits"]["composite"]["maximum"]) == (6_200, 4_500)
    assert summary["splits"]["composite"]["paper"] < 4_500, "the paper's optimum counts as three steps"
    assert summary["missing"] == 0 and summary["understood"] == 1
    for one in found:
        assert from_json(to_json(one), Played) == one
        assert all(check.passed for check in one.checks)
        assert len(one.turns) == 1 or mode == "multi"


async def test_what_was_done_is_written_down() -> None:
    lines = solution(shipped_tasks()["composite_approve_stake_tokens"])
    one = await played("composite_approve_stake_tokens", *lines, SUBMIT)
    assert one.ending == "submitted" and (one.steps, one.optimal_steps) == (2, 2)
    first, second, last = one.turns
    assert first.messages[0].role == "system" and one.instruction in first.messages[1].content
    assert "rounds left" in second.messages[0].content
    (approve,), (stake,) = first.acts, second.acts
    assert approve.success and approve.call.startswith("CAKE.approve(staking, ")
    assert stake.success and any("Transfer(me, staking" in event for event in stake.events)
    assert [act.wrote for act in last.acts] == [SUBMIT]
    before, after = (int(number) for number in one.holdings["staked CAKE"])
    assert after > before == 0 and int(one.holdings["CAKE"][1]) < int(one.holdings["CAKE"][0])


@pytest.mark.parametrize(
    ("lines", "ending", "turns"),
    [
        (["I would rather not."], "out of attempts", 3),
        ([LOOK], "out of rounds", 4),
        (['{"action": "error", "reason": "no gas"}'], "gave up", 1),
        ([SUBMIT], "submitted", 1),
    ],
)
async def test_how_a_workflow_ends(lines: list[str], ending: str, turns: int) -> None:
    one = await played("composite_wrap_unwrap_cycle", *lines)
    assert (one.ending, len(one.turns)) == (ending, turns)
    assert one.strict < 20
    assert all(act.understood == (ending != "out of attempts") for turn in one.turns for act in turn.acts)


async def test_one_answer_is_all_that_naive_takes() -> None:
    first, _ = solution(shipped_tasks()["composite_wrap_unwrap_cycle"])
    one = await played("composite_wrap_unwrap_cycle", f"{first} and then I see.", mode="naive")
    assert len(one.turns) == 1 and len(one.turns[0].acts) == 1 and 0 < one.points < 100
    words = await played("composite_wrap_unwrap_cycle", "no idea", mode="naive")
    assert words.points < 20 and not words.turns[0].acts[0].understood


async def test_a_grammar_comes_with_each_turn_where_it_is_asked_for() -> None:
    speaker = Script([LOOK])
    wanted = instance(shipped_tasks()["composite_wrap_unwrap_cycle"], 0, 0)
    await play(wanted, 0, speaker, Manner("typed", constrain="form"), PyrevmChain())
    assert len(speaker.grammars) == 4 and all(grammar is not None for grammar in speaker.grammars)


@dataclass
class Failing(Script):
    """Fails at its second answer."""

    error: Exception = field(default_factory=lambda: NetworkError("gone."))

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        if len(messages) > 2:
            raise self.error
        return await super().reply(messages, seed=seed, grammar=grammar)


async def test_a_failure_is_no_score_and_leaves_the_chain_as_it_was() -> None:
    chain = PyrevmChain()
    definition = shipped_tasks()["composite_approve_stake_tokens"]
    wanted = instance(definition, 0, 0)
    before = (chain.block_number(), chain.timestamp(), chain.nonce("0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"))
    with pytest.raises(NetworkError):
        await play(wanted, 0, Failing(solution(definition)), Manner("typed"), chain)
    assert before == (
        chain.block_number(),
        chain.timestamp(),
        chain.nonce("0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"),
    )
    full = Failing(solution(definition), error=ContextFull("full."))
    one = await play(wanted, 0, full, Manner("typed"), chain)
    assert one.ending == "out of context" and len(one.turns) == 1 and one.points < 100


def test_instances_are_pure_and_held_out() -> None:
    definition = shipped_tasks()["bnb_transfer_basic"]
    seeds = [instance(definition, number, 5).seed for number in range(200)]
    assert seeds == [instance(definition, number, 5).seed for number in range(200)] and len(set(seeds)) == 200
    assert not set(seeds) & {instance(definition, number, 6).seed for number in range(200)}
    env = EvmQuests(EvmQuests.Settings())
    assert all(seed % 2 == 1 for seed in seeds) and all(env.task("train", i, 0).seed % 2 == 0 for i in range(50))


def test_students_t() -> None:
    assert t_95(1) == 12.706 and t_95(10) == 2.228
    for degrees, wanted in ((11, 2.201), (15, 2.131), (30, 2.042), (100, 1.984)):
        assert t_95(degrees) == pytest.approx(wanted, abs=1e-3)


def scored(base: Played, task: str, round_: int, strict: float) -> Played:
    return replace(base, task=task, round=round_, strict=strict, paper=100.0)


async def test_an_interval_is_over_rounds() -> None:
    base = await played("bnb_transfer_basic", "nothing")
    rounds = [scored(base, task, number, score) for number, score in enumerate((10.0, 20.0, 60.0)) for task in "ab"]
    found = summarise(rounds, num_tasks=2, rounds=3)["splits"]["total"]
    half = 4.303 * math.sqrt((20**2 + 10**2 + 30**2) / 2) / math.sqrt(3)
    assert found["strict"] == 60 and found["maximum"] == 200
    assert found["strict_interval"] == pytest.approx([max(0, 2 * (30 - half)), 2 * min(100, 30 + half)], abs=0.1)
    assert found["paper_interval"] == [200, 200]
    assert summarise(rounds[:2], num_tasks=2, rounds=1)["splits"]["total"]["strict_interval"] is None
    gap = summarise(rounds[:-1], num_tasks=2, rounds=3)
    assert gap["missing"] == 1
    assert gap["splits"]["total"]["strict"] == pytest.approx(30 + 15), "each task by the mean of what it has"


def test_nothing_played_is_no_score() -> None:
    found = summarise([], num_tasks=2, rounds=1)
    assert (found["missing"], found["splits"], found["understood"]) == (2, {}, 0)


class Reader(HTMLParser):
    """Notes what a page is made of."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '<script>alert("x")</script><img src=http://evil/ onerror=1>&lt;"\'</pre></details>'


@given(st.text(st.characters(codec="utf-8"), max_size=60))
async def test_whatever_was_written_is_text_in_the_report(words: str) -> None:
    said = json.dumps({"action": "error", "reason": HOSTILE + words})
    one = await played("composite_approve_stake_tokens", *solution(STAKE), said)
    one = replace(one, instruction=HOSTILE + words)
    summary = summarise([one], num_tasks=1, rounds=1)
    reader = Reader()
    reader.feed(page(f"A model named {HOSTILE}", {"model": HOSTILE}, summary, [one]))
    assert reader.open == [] and reader.addresses == []
    assert "script" not in reader.tags and "img" not in reader.tags
    assert HOSTILE in reader.text
