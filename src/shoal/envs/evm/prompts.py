"""What an agent is told when a quest begins: how to act, what there is on the chain, and the task's words.

Three ways to act: `typed` actions as JSON, `typescript` modules as the benchmark has them, and `python` functions.
Scripts act one transaction or query at a time; in a workflow, JSON ends it.

Invariant: the words of a prompt depend on the task's instance alone (the chain's time is that of the instance).
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import lru_cache
from typing import Any, Literal

from eth_utils.address import to_checksum_address

from shoal.envs.evm.actions import CHAIN_FUNCTIONS
from shoal.envs.evm.genesis import AGENT, contract_file, load_genesis
from shoal.envs.evm.grammar import SET_UP
from shoal.envs.evm.quest import Quest
from shoal.protocol.chat import Message

Acting = Literal["typescript", "python", "typed"]

GUIDE = """You act on an EVM chain (BNB Smart Chain, chain id 56) from the account {me}. Answer with one JSON object.
To send BNB ("data" is optional):
{{"action": "pay", "to": ADDRESS, "value": AMOUNT}}
To call a contract:
{{"action": "send", "to": ADDRESS, "function": "transfer(address,uint256)", "args": [...], "value": AMOUNT}}
To sign and send a permit:
{{"action": "permit", "token": ADDRESS, "spender": ADDRESS, "value": AMOUNT, "deadline": SECONDS}}
To read ("index" picks one of several values; without "to" the function is one of {chain_functions}):
{{"action": "query", "calls": {{NAME: {{"to": ADDRESS, "function": "balanceOf(address)", "args": [...]}}}}}}
To end a workflow: {{"action": "submit"}}. To give up: {{"action": "error", "reason": TEXT}}.
An ADDRESS is hex or one of these names: me, {names}.
An AMOUNT is in wei, or like "0.5 ether"; every token has 18 decimals. Results of queries are in base units.
The chain's time is {now}; deadlines lie between now and an hour from now. Gas is free."""
BRIEF = 'Answer with JSON like {"action": "pay", "to": "0x...", "value": "... ether"}.'
"""Whoever copies it under a grammar pays somebody the wrong amount: a small model has something to start from."""
ATOMIC = "Do it with exactly one action."
COMPOSITE = "It takes several actions; you see what each did. Use no more than needed, then submit."
ONE_SHOT = "It takes several actions, and you answer only once: with a JSON list of all of them, in order."
SCRIPT = "Do it with exactly one script."
SCRIPTS_AT_ONCE = """It takes several scripts, one for each transaction or query, and you answer only once: with all of
them, in order, each in a block of its own."""


def opening(
    quest: Quest, acting: Acting = "typed", *, style: Literal["full", "brief"] = "full", one_shot: bool = False
) -> tuple[Message, ...]:
    """The conversation that a quest begins with.

    Args:
        quest: begun.
        style: `brief` shows one example of a typed action and no more.
        one_shot: a workflow is answered as a whole, without feedback.
    """
    words = quest.instance.instruction
    composite = quest.instance.definition.composite
    if acting == "typed" and style == "brief":
        return (Message(role="user", content=f"{words} {BRIEF}"),)
    if acting == "typed":
        ending = (ONE_SHOT if one_shot else COMPOSITE) if composite else ATOMIC
        guide = GUIDE.format(
            me=to_checksum_address(AGENT),
            names=", ".join(load_genesis().names),
            chain_functions=", ".join(CHAIN_FUNCTIONS),
            now=quest.chain.timestamp(),
        )
    else:
        # Typed actions need no sandbox, so they do not load what runs scripts.
        from shoal.envs.evm.scripts import guide as scripts

        ending = (SCRIPTS_AT_ONCE if one_shot else scripts.COMPOSITE) if composite else SCRIPT
        guide = f"{scripts.script_guide(acting, quest.chain.timestamp())}\nTheir functions:\n{interfaces_in_words()}"
    return (Message(role="system", content=guide), Message(role="user", content=f"{words}\n{ending}"))


@lru_cache(maxsize=1)
def interfaces_in_words() -> str:
    """Every contract's names and functions, as ethers and the Python interface read them."""
    named: dict[str, list[str]] = defaultdict(list)
    genesis = load_genesis()
    for name, address in genesis.names.items():
        # Whoever talks to the proxy talks through it.
        kind = genesis.kinds[address]
        named["Implementation" if kind == "Proxy" else kind].append(name)
    artifacts = json.loads(contract_file("artifacts.json"))
    return "\n".join(
        f"{', '.join(names)}:\n" + "\n".join(f"  {_fragment(entry)}" for entry in _functions(artifacts[kind]))
        for kind, names in named.items()
    )


def _functions(artifact: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in artifact["abi"] if entry["type"] == "function" and entry["name"] not in SET_UP]


def _fragment(entry: dict[str, Any]) -> str:
    """A function as ethers reads it."""
    inputs = ", ".join(f"{i['type']} {i['name']}".strip() for i in entry["inputs"])
    outputs = ", ".join(f"{o['type']} {o['name']}".strip() for o in entry["outputs"])
    kind = "" if entry["stateMutability"] == "nonpayable" else f" {entry['stateMutability']}"
    return f"function {entry['name']}({inputs}){kind}" + (f" returns ({outputs})" if outputs else "")
