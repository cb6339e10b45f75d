"""The grammar of typed actions: it lets every solution through, and nothing that is no action."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from shoal.envs.evm.actions import ActionError, Query, Submit, read_action, resolve, transaction, write_action
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.environment import EvmQuests
from shoal.envs.evm.grammar import action_grammar
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.selftest import reference
from shoal.envs.registry import make
from shoal.protocol.sampling import MAX_GRAMMAR_BYTES

BYTES = LLTokenizer("byte")


def matcher(composite: bool) -> LLMatcher:
    made = LLMatcher(BYTES, LLMatcher.grammar_from_lark(action_grammar(composite).text), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def matches(text: str, composite: bool) -> bool:
    found = matcher(composite)
    return found.try_consume_tokens(list(text.encode())) == len(text.encode()) and found.is_accepting()


def test_the_grammar_is_small() -> None:
    assert len(action_grammar(True).text) < MAX_GRAMMAR_BYTES // 8


def test_every_reference_solution_matches() -> None:
    chain = PyrevmChain()
    for definition in shipped_tasks().values():
        actions, verdict = reference(sample(definition, 3), chain)
        assert verdict.points == 100
        for action in actions:
            text = write_action(action)
            assert matches(text, definition.composite), f"{definition.id}: {text}"
            assert read_action(text) == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        'Sure! {"action": "pay", "to": "me", "value": "1"}',
        '{"action": "pay", "to": "0x12", "value": "1"}',
        '{"action": "pay", "to": "Bob", "value": "1"}',
        '{"action": "pay", "to": "me", "value": "a lot"}',
        '{"action": "pay", "to": "me", "value": "1"} and more',
        '{"action": "send", "to": "USDT", "function": "transfer(address,uint256)", "args": ["1", "me"]}',
        '{"action": "send", "to": "USDT", "function": "fly(address)", "args": ["me"]}',
        '{"action": "query", "calls": {}}',
    ],
)
def test_what_is_no_action_is_not_let_through(text: str) -> None:
    assert not matches(text, composite=True)


def test_only_a_workflow_can_be_submitted() -> None:
    for text in ('{"action": "submit"}', '{"action": "error", "reason": "no money"}'):
        assert matches(text, composite=True) and not matches(text, composite=False)


@pytest.mark.parametrize("composite", [False, True])
def test_whatever_is_let_through_is_an_action_that_can_be_encoded(composite: bool) -> None:
    kinds = set()
    for seed in range(40):
        text = drawn(matcher(composite), random.Random(seed))
        action = read_action(text)
        kinds.add(action.action)
        try:
            if isinstance(action, Query):
                for call in action.calls.values():
                    if call.to:
                        resolve(call)
            elif not isinstance(action, Submit) and action.action in ("send", "pay"):
                transaction(action)  # type: ignore[arg-type]
        except ActionError as error:
            # A number beyond its type is the one thing that a pattern does not see; so are odd bytes.
            assert "fit" in str(error) or "between 0 and 2^256" in str(error) or "too large" in str(error), text
    assert len(kinds) >= 4


def drawn(found: LLMatcher, rng: random.Random) -> str:
    """A random text of the grammar; whatever may end soon does."""
    text = bytearray()
    while not found.is_stopped() and len(text) < 4000:
        bits = np.unpackbits(np.frombuffer(found.compute_bitmask(), dtype=np.uint8), bitorder="little")
        choices = [token for token in np.flatnonzero(bits[:256]) if token < 128]
        closing = [token for token in choices if chr(token) in '"]}']
        token = int(rng.choice(closing if closing and rng.random() < 0.6 else choices))
        assert found.consume_token(token)
        text.append(token)
    return text.decode()


async def test_the_environment_constrains_where_it_is_asked_to() -> None:
    settings = {"tasks": ["composite_wrap_unwrap_cycle"]}
    free, bound = make("evm", settings), make("evm", {**settings, "constrain": "form"})
    look = '{"action": "query", "calls": {"b": {"function": "eth_blockNumber"}}}'
    for env, grammar in ((free, None), (bound, action_grammar(True))):
        opening = await env.reset(env.task("heldout", 0, 0))
        assert opening.grammar == grammar
        assert (await env.step(look)).grammar == grammar
        await env.close()
    atomic = EvmQuests(EvmQuests.Settings(constrain="form", tasks=("bnb_transfer_basic",)))  # type: ignore[call-arg]
    assert (await atomic.reset(atomic.task("train", 0, 0))).grammar == action_grammar(False)
    await atomic.close()


async def test_where_only_what_was_read_may_be_written() -> None:
    env = make("evm", {"tasks": ["bnb_transfer_basic"], "prompt": "brief", "constrain": "seen"})
    task = env.task("heldout", 0, 0)
    opening = await env.reset(task)
    await env.close()
    assert opening.grammar is not None
    to = re.findall("0x[0-9a-fA-F]{40}", opening.messages[0].content)[0]
    found = LLMatcher(BYTES, LLMatcher.grammar_from_lark(opening.grammar.text), log_level=0)
    for address, fits in ((to, True), ("USDT", True), (f"0x{1:040x}", False)):
        text = json.dumps({"action": "pay", "to": address, "value": "1 ether"}).encode()
        found.reset()
        assert (found.try_consume_tokens(list(text)) == len(text)) is fits
