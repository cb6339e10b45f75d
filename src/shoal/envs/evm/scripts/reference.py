"""Reference solutions as scripts: a typed action written in each language, as an agent might write it.

They show that whatever a task asks can be done by a script, and what scripts cost (`shoal bench evm`).
"""

from __future__ import annotations

import json
from typing import Any

from shoal.envs.evm.abi import parse_signature
from shoal.envs.evm.actions import Call, Pay, Permit, Query, Send, address, amount, argument, octets, outputs, resolve
from shoal.envs.evm.scripts.reply import Language

ScriptedAction = Send | Pay | Permit | Query
_CHAIN_READS: dict[Language, dict[str, str]] = {
    "python": {
        "eth_blockNumber": "chain.block_number",
        "eth_gasPrice": "chain.gas_price",
        "eth_maxPriorityFeePerGas": "chain.max_priority_fee",
        "eth_getBalance": "chain.get_balance({0})",
        "eth_getTransactionCount": "chain.get_transaction_count({0})",
    },
    "typescript": {
        "eth_blockNumber": "await provider.getBlockNumber()",
        "eth_gasPrice": "(await provider.getFeeData()).gasPrice",
        "eth_maxPriorityFeePerGas": "(await provider.getFeeData()).maxPriorityFeePerGas",
        "eth_getBalance": "await provider.getBalance({0})",
        "eth_getTransactionCount": "await provider.getTransactionCount({0})",
    },
}


def write_script(action: ScriptedAction, language: Language) -> str:
    """A script that does what the action does."""
    return _python(action) if language == "python" else _typescript(action)


def _literal(kind: str, value: Any, language: Language) -> str:
    """An argument of an action in the language, its value that of the typed action."""
    return _value(argument(kind, value), language)


def _value(value: Any, language: Language) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(item, language) for item in value)}]"
    if isinstance(value, bytes):
        return f'"0x{value.hex()}"'
    if isinstance(value, bool):
        return json.dumps(value) if language == "typescript" else repr(value)
    if isinstance(value, int):
        return f"{value}n" if language == "typescript" else str(value)
    return json.dumps(value) if language == "typescript" else repr(value)


def _arguments(signature: str, args: tuple[Any, ...], language: Language) -> str:
    _, kinds = parse_signature(signature)
    return ", ".join(_literal(kind, arg, language) for kind, arg in zip(kinds, args, strict=True))


def _fragment(signature: str) -> str:
    """The function as a line of an ABI."""
    types = outputs(signature)
    return f"function {signature}" + (f" returns ({','.join(types)})" if types else "")


def _place(to: str, contracts: str) -> str:
    """A contract by its name where it has one, else its address."""
    return f'{contracts}["{to}"]' if not to.startswith("0x") and to != "me" else f'"{address(to)}"'


def _python(action: ScriptedAction) -> str:
    lines = ["def execute_skill(chain, agent_address, deployed_contracts):"]
    if isinstance(action, Pay):
        data = "0x" + octets(action.data).hex()
        lines.append(f'return {{"to": "{address(action.to)}", "value": {amount(action.value)}, "data": "{data}"}}')
    elif isinstance(action, Permit):
        token, spender = address(action.token), address(action.spender)
        lines.append(f'return chain.sign_permit("{token}", "{spender}", {amount(action.value)}, {action.deadline})')
    elif isinstance(action, Send):
        lines += [
            _python_contract(action),
            f"return {_python_function(action)}.build_transaction({{'value': {amount(action.value)}}})",
        ]
    else:
        lines.append("results = {}")
        for name, call in action.calls.items():
            if call.to:
                lines.append(_python_contract(call))
                read = f"{_python_function(call)}.call()"
            else:
                read = _chain_read(call, "python")
            lines.append(f"results[{name!r}] = {read}" + ("" if call.index is None else f"[{call.index}]"))
        lines.append("return results")
    return "\n    ".join(lines) + "\n"


def _python_contract(call: Call) -> str:
    _, signature, _ = resolve(call)
    return f"contract = chain.contract({_place(call.to, 'deployed_contracts')}, [{_fragment(signature)!r}])"


def _python_function(call: Call) -> str:
    _, signature, _ = resolve(call)
    return f"contract.functions[{signature!r}]({_arguments(signature, call.args, 'python')})"


def _chain_read(call: Call, language: Language) -> str:
    args = [json.dumps(address(arg)) for arg in call.args]
    return _CHAIN_READS[language][call.function].format(*args)


def _typescript(action: ScriptedAction) -> str:
    body: list[str] = []
    if isinstance(action, Pay):
        data = "0x" + octets(action.data).hex()
        body.append(f'return {{ to: "{address(action.to)}", value: {amount(action.value)}n, data: "{data}" }};')
    elif isinstance(action, Permit):
        body += _typescript_permit(action)
    elif isinstance(action, Send):
        _, signature, _ = resolve(action)
        args = _arguments(signature, action.args, "typescript")
        body += [
            _typescript_contract(action),
            f"return await contract.getFunction({json.dumps(signature)}).populateTransaction("
            f"{args}{', ' if args else ''}{{ value: {amount(action.value)}n }});",
        ]
    else:
        body.append("const provider = new ethers.JsonRpcProvider(providerUrl);")
        body.append("const results: Record<string, unknown> = {};")
        for name, call in action.calls.items():
            body += _typescript_read(name, call)
        body.append("return results;")
    head = "executeSkill(providerUrl: string, agentAddress: string, deployedContracts: Record<string, string>"
    return (
        'import { ethers } from "ethers";\n\n'
        f"export async function {head}, agentKey: string) {{\n  " + "\n  ".join(body) + "\n}\n"
    )


def _typescript_contract(call: Call, provider: str = "") -> str:
    _, signature, _ = resolve(call)
    place = _place(call.to, "deployedContracts")
    return f"const contract = new ethers.Contract({place}, [{json.dumps(_fragment(signature))}]{provider});"


def _typescript_read(name: str, call: Call) -> list[str]:
    pick = "" if call.index is None else f"[{call.index}]"
    if not call.to:
        return [f"results[{json.dumps(name)}] = ({_chain_read(call, 'typescript')}){pick};"]
    _, signature, _ = resolve(call)
    args = _arguments(signature, call.args, "typescript")
    read = f"await contract.getFunction({json.dumps(signature)}).staticCall({args})"
    contract = _typescript_contract(call, ", provider")
    return ["{", f"  {contract}", f"  results[{json.dumps(name)}] = ({read}){pick};", "}"]


def _typescript_permit(action: Permit) -> list[str]:
    token, spender = address(action.token), address(action.spender)
    fields = ["owner:address", "spender:address", "value:uint256", "nonce:uint256", "deadline:uint256"]
    types = ", ".join('{{ name: "{}", type: "{}" }}'.format(*field.split(":")) for field in fields)
    return [
        "const provider = new ethers.JsonRpcProvider(providerUrl);",
        f'const token = new ethers.Contract("{token}", [',
        '  "function name() view returns (string)", "function nonces(address) view returns (uint256)",',
        '  "function permit(address,address,uint256,uint256,uint8,bytes32,bytes32)",',
        "], provider);",
        "const nonce = await token.nonces(agentAddress);",
        f'const domain = {{ name: await token.name(), version: "1", chainId: 56, verifyingContract: "{token}" }};',
        f'const message = {{ owner: agentAddress, spender: "{spender}", value: {amount(action.value)}n, nonce,',
        f"  deadline: {action.deadline} }};",
        f"const signed = await new ethers.Wallet(agentKey).signTypedData(domain, {{ Permit: [{types}] }}, message);",
        "const { v, r, s } = ethers.Signature.from(signed);",
        f'return await token.permit.populateTransaction(agentAddress, "{spender}", {amount(action.value)}n,',
        f"  {action.deadline}, v, r, s);",
    ]
