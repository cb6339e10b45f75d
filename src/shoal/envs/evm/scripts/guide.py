"""What an agent is told about scripts: the form of each language, as a system prompt."""

from __future__ import annotations

from eth_utils.address import to_checksum_address

from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.scripts.reply import Language

_TYPESCRIPT = """You act on an EVM chain (BNB Smart Chain, chain id 56) from the account {me}.
Answer with one TypeScript module in a ```typescript block. It exports

async function executeSkill(providerUrl: string, agentAddress: string, deployedContracts: Record<string, string>,
  agentKey: string)

and may import {{ ethers }} from "ethers" (version 6). To change the chain, return one unsigned transaction, such as
{{ to, data, value }}; the platform signs and sends it. To answer a question, return an object of the fields asked for.
The provider at providerUrl only reads. agentKey signs messages, such as a permit."""

_PYTHON = """You act on an EVM chain (BNB Smart Chain, chain id 56) from the account {me}.
Answer with one Python module in a ```python block. It defines

def execute_skill(chain, agent_address, deployed_contracts):

To change the chain, return one unsigned transaction, such as {{"to": ..., "data": ..., "value": ...}}; the platform
signs and sends it. To answer a question, return a dict of the fields asked for. The chain has:
chain.get_balance(address), chain.get_transaction_count(address), chain.block_number, chain.gas_price,
chain.max_priority_fee, chain.get_block("latest"), chain.get_logs({{...}}), chain.call({{"to": ..., "data": ...}}),
chain.sign_permit(token, spender, value, deadline), which returns a transaction, and
chain.contract(address, abi), whose abi is JSON or a list such as ["function balanceOf(address) returns (uint256)"] and
may be left out for deployed contracts: contract.functions.balanceOf(address).call(),
contract.functions.transfer(to, amount).build_transaction({{"value": 0}}).
to_wei(1.5, "ether") and from_wei are there; so are eth_abi and eth_utils."""

_COMMON = """
deployed contracts: {names}.
Every token has 18 decimals. The chain's time is {now}; deadlines lie between now and an hour from now. Gas is free."""

COMPOSITE = """It takes several steps. Answer each time with one script; you see what it did. Use no more than needed.
When all is done answer with {"action": "submit"} alone."""


def script_guide(language: Language, now: int) -> str:
    """The system prompt for scripts, at the chain's time."""
    words = {
        "me": to_checksum_address(AGENT),
        "names": ", ".join(f"{name} {to_checksum_address(a)}" for name, a in load_genesis().names.items()),
        "now": now,
    }
    form = _TYPESCRIPT if language == "typescript" else _PYTHON
    return (form + _COMMON).format(**words)
