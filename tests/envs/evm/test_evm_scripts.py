"""Scripts in both languages: what they can do, how they fail, and that they do not meet."""

# Programs inside texts keep their long lines.
# ruff: noqa: E501

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest

from shoal.envs.evm.actions import ActionError, Found, Pay, Submit
from shoal.envs.evm.anvil import AnvilChain, find_anvil
from shoal.envs.evm.chain import GENESIS_BLOCK, GENESIS_TIME, ChainBackend, ChainError
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.judging import Verdict
from shoal.envs.evm.language import ETHER
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.sampling import Instance, sample
from shoal.envs.evm.scripts import ScriptRunner, find_script
from shoal.envs.evm.scripts.guide import script_guide
from shoal.envs.evm.scripts.reference import write_script
from shoal.envs.evm.selftest import reference

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUICK = ("erc20_transfer_fixed", "erc20_permit", "query_token_metadata", "composite_query_swap_verify_output")
TRANSFER = "erc20_transfer_fixed"


async def by_scripts(runner: ScriptRunner, instance: Instance, chain: ChainBackend) -> Verdict:
    """The verdict on the reference solution, each of its acts done by a script."""
    actions, _ = reference(instance, chain)
    quest = Quest(instance, chain)
    quest.begin()
    try:
        for action in actions:
            act = await runner.run(quest, write_script(action, runner.language))  # type: ignore[arg-type]
            assert not isinstance(act, ActionError), f"{instance.definition.id}: {act}"
            if quest.act(act).done:
                break
        else:
            quest.act(Submit(action="submit"))
        return quest.verdict()
    finally:
        quest.end()


async def solve(runner: ScriptRunner, names: Iterable[str], seeds: int, chain: ChainBackend) -> None:
    for name in names:
        for seed in range(seeds):
            verdict = await by_scripts(runner, sample(shipped_tasks()[name], seed), chain)
            assert verdict.strict == 100, (name, seed, verdict)


async def run(runner: ScriptRunner, script: str, task: str = TRANSFER) -> Pay | Found | ActionError:
    """What a script comes to on the first instance of a task."""
    quest = Quest(sample(shipped_tasks()[task], 0), PyrevmChain())
    quest.begin()
    return await runner.run(quest, script)


async def test_python_scripts_solve_tasks(python: ScriptRunner, pyrevm: ChainBackend) -> None:
    await solve(python, QUICK, 2, pyrevm)


async def test_typescript_scripts_solve_tasks(typescript: ScriptRunner, pyrevm: ChainBackend) -> None:
    await solve(typescript, QUICK, 1, pyrevm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_python_scripts_solve_everything(python: ScriptRunner, pyrevm: ChainBackend) -> None:
    await solve(python, shipped_tasks(), 3, pyrevm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_typescript_scripts_solve_everything(typescript: ScriptRunner, pyrevm: ChainBackend) -> None:
    await solve(typescript, shipped_tasks(), 1, pyrevm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_scripts_solve_everything_on_anvil(python: ScriptRunner, anvil: ChainBackend) -> None:
    await solve(python, shipped_tasks(), 1, anvil)


async def test_scripts_work_on_anvil(typescript: ScriptRunner, anvil: ChainBackend) -> None:
    await solve(typescript, QUICK[:2], 1, anvil)


async def test_ethers_reads_the_chain(typescript: ScriptRunner) -> None:
    script = """
import { ethers } from "ethers";
export default async function executeSkill(providerUrl: string, agentAddress: string, deployedContracts: Record<string, string>) {
  const provider = new ethers.JsonRpcProvider(providerUrl);
  const abi = ["function transfer(address to, uint256 amount) returns (bool)", "function decimals() view returns (uint8)",
    "event Transfer(address indexed from, address indexed to, uint256 value)"];
  const token = new ethers.Contract(deployedContracts.USDT, abi, provider);
  const [network, block, balance, count, code, fees, head, slot, logs, gas] = await Promise.all([
    provider.getNetwork(), provider.getBlockNumber(), provider.getBalance(agentAddress),
    provider.getTransactionCount(agentAddress), provider.getCode(deployedContracts.USDT), provider.getFeeData(),
    provider.getBlock("latest"), provider.getStorage(deployedContracts.USDT, 0),
    token.queryFilter(token.filters.Transfer(), 0, "latest"),
    token.transfer.estimateGas(deployedContracts.router, 5n, { from: agentAddress })]);
  let reason = "";
  try { await token.transfer.staticCall(deployedContracts.router, ethers.parseEther("5000"), { from: agentAddress }); }
  catch (error) { reason = (error as { reason: string }).reason; }
  let refused = "";
  try { await provider.send("evm_mine", []); } catch (error) { refused = (error as Error).message; }
  let unsendable = "";
  try { await (await provider.getSigner()).sendTransaction({ to: agentAddress }); } catch (error) { unsendable = (error as Error).message; }
  return { query_result: { network: network.chainId, block, balance, count, code: code.length, timestamp: head!.timestamp,
    price: fees.gasPrice, most: fees.maxFeePerGas, priority: fees.maxPriorityFeePerGas, slot, logs: logs.length, reason,
    gas: gas > 21000n, refused: refused.includes("not offered"), unsendable: unsendable.includes("the platform signs"),
    decimals: await token.decimals() } };
}
"""
    act = await run(typescript, script)
    assert isinstance(act, Found), act
    assert act.answer.pop("code") == 2 + 2 * len(load_genesis().accounts[load_genesis().names["USDT"]].code)
    assert int(act.answer.pop("slot"), 16) >= 0
    assert act.answer == {
        "network": "56", "block": GENESIS_BLOCK, "balance": str(100 * ETHER), "count": 0, "timestamp": GENESIS_TIME,
        "price": "3000000000", "most": "3000000000", "priority": "1000000000", "logs": 0,
        "reason": "transfer amount exceeds balance", "gas": True, "refused": True, "unsendable": True, "decimals": "18",
    }  # fmt: skip


async def test_python_reads_the_chain(python: ScriptRunner) -> None:
    script = """
def execute_skill(chain, agent_address, deployed_contracts):
    usdt = chain.contract("USDT")
    same = chain.contract(deployed_contracts["USDT"], '[{"type": "function", "name": "balanceOf", "inputs": [{"type": "address"}], "outputs": [{"type": "uint"}]}]')
    try: usdt.functions.transfer(deployed_contracts["router"], to_wei(5000)).call(); reason = ""
    except Exception as error: reason = str(error)
    try: chain.request("eth_sendTransaction", [{}]); refused = ""
    except Exception as error: refused = str(error)
    try: usdt.functions.fly(1); missing = ""
    except AttributeError as error: missing = "fly" in str(error)
    router = chain.contract("router")
    quote = router.functions.getAmountsOut(to_wei("1.5"), [deployed_contracts["USDT"], deployed_contracts["BUSD"]]).call()
    return {
        "block": chain.block_number, "price": chain.gas_price, "priority": chain.max_priority_fee,
        "balance": chain.get_balance(agent_address), "count": chain.get_transaction_count(agent_address),
        "code": len(chain.get_code(deployed_contracts["USDT"])), "timestamp": chain.get_block()["timestamp"],
        "logs": len(chain.get_logs({"fromBlock": 0, "toBlock": "latest"})), "held": usdt.functions.balanceOf(agent_address).call(),
        "same": same.functions["balanceOf(address)"](agent_address).call() == usdt.functions.balanceOf(agent_address).call(),
        "reason": reason, "refused": refused, "missing": missing, "quote": len(quote),
        "owner": chain.contract("nft").functions.ownerOf(1).call() == agent_address, "ether": str(from_wei(15 * 10**17)),
        "encoded": usdt.encode_abi("decimals"), "receipt": chain.get_transaction_receipt("0x00") is None,
        "benchmark": deployed_contracts["erc1363_token_address"] == deployed_contracts["T1363"],
    }
"""
    act = await run(python, script)
    assert isinstance(act, Found), act
    code = len(load_genesis().accounts[load_genesis().names["USDT"]].code)
    assert act.answer == {
        "block": GENESIS_BLOCK, "price": 3 * 10**9, "priority": 10**9, "balance": 100 * ETHER, "count": 0, "code": code,
        "timestamp": GENESIS_TIME, "logs": 0, "held": 1000 * ETHER, "same": True,
        "reason": "execution reverted: transfer amount exceeds balance",
        "refused": "a script returns its transaction; the platform signs and sends it", "missing": True, "quote": 2,
        "owner": True, "ether": "1.5", "encoded": "0x313ce567", "receipt": True, "benchmark": True,
    }  # fmt: skip


async def test_a_python_script_that_fails_is_told_why(python: ScriptRunner) -> None:
    head = "def execute_skill(chain, agent_address, deployed_contracts):\n    "
    for script, reason in (
        ("def execute_skill(:", "SyntaxError"),
        ("print('hello')", "no function execute_skill"),
        (head + "return 1 / 0", r"ZeroDivisionError: division by zero \(line 2\)"),
        (head + "import web3", "No module named 'web3'"),
        (head + "return None", "must return"),
        (head + "return {}", "no fields"),
        (head + "return 'not json'", "not JSON"),
        (head + "raise SystemExit('bye')", "returned nothing: bye"),
        (head + "return chain.contract('0x' + '00' * 20).functions.f().call()", "give its abi"),
        (head + "return {'to': 'Bob', 'value': 1}", "no address"),
        ("#" * 70_000, "more than"),
        ("\ud800", "SyntaxError"),
    ):
        act = await run(python, script)
        assert isinstance(act, ActionError), (script, act)
        with pytest.raises(ActionError, match=reason):
            raise act
    assert isinstance(await run(python, head + "return {'to': agent_address, 'value': 1}"), Pay)


async def test_a_typescript_script_that_fails_is_told_why(typescript: ScriptRunner) -> None:
    head = "export async function executeSkill(providerUrl: string) { "
    cases = (
        ("export async function executeSkill( {", "Expected"),
        ("console.log('hello')", "exports no function executeSkill"),
        (head + "throw new Error('no way'); }", "no way"),
        (head + "import('web3'); return await import('web3'); }", "web3"),
        (head + "return undefined; }", "must return"),
        (head + "return { to: 'Bob', value: 1n }; }", "no address"),
        (head + "Deno.exit(3); }", "returned nothing"),
    )
    for script, reason in cases:
        act = await run(typescript, script)
        assert isinstance(act, ActionError), (script, act)
        with pytest.raises(ActionError, match=reason):
            raise act
    assert isinstance(
        await run(typescript, head + "return JSON.stringify({ to: ethers.ZeroAddress, value: '1' }); }"), Pay
    )


async def test_a_script_finds_nothing_of_an_earlier_one(python: ScriptRunner) -> None:
    first = """
import builtins, json, shoal.envs.evm.scripts.guest.chain as api
def execute_skill(chain, agent_address, deployed_contracts):
    open('/scratch/left', 'w').write('x')
    builtins.open_door = api.Chain.get_balance = json.dumps
    return {"path": chain._path}
"""
    second = """
import builtins, os
def execute_skill(chain, agent_address, deployed_contracts):
    mine = chain._path
    chain._path = {path!r}
    try: stolen = chain.block_number
    except ValueError: stolen = "refused"
    chain._path = mine
    return {{"files": str(sorted(os.listdir('/scratch'))), "door": hasattr(builtins, 'open_door'), "stolen": stolen,
             "balance": chain.get_balance(agent_address), "new": mine != {path!r}}}
"""
    opened = await run(python, first)
    assert isinstance(opened, Found)
    act = await run(python, second.format(path=opened.answer["path"]))
    assert act == Found(
        {"files": "['main.py', 'skill.py', 'task.json']", "door": False, "stolen": "refused", "balance": 100 * ETHER,
         "new": True}
    )  # fmt: skip


async def test_scripts_of_two_quests_have_a_chain_each(python: ScriptRunner) -> None:
    script = """
def execute_skill(chain, agent_address, deployed_contracts):
    return {"balance": chain.get_balance(agent_address)}
"""
    quests = [Quest(sample(shipped_tasks()["query_bnb_balance"], n), PyrevmChain()) for n in range(4)]
    for number, quest in enumerate(quests):
        quest.begin()
        quest.act(Pay(action="pay", to="whale", value=str(number)))
    acts = await asyncio.gather(*(python.run(quest, script) for quest in quests))
    assert acts == [Found({"balance": 100 * ETHER - number}) for number in range(4)]
    assert [len(quest.record.asked) for quest in quests] == [1] * 4
    assert quests[0].record.asked[0].data == AGENT.encode()


async def test_the_page_s_examples_work(repository: Path, python: ScriptRunner, typescript: ScriptRunner) -> None:
    page = (repository / "docs" / "evm.md").read_text(encoding="utf-8")
    acts = [await run(runner, find_script(page, runner.language)) for runner in (python, typescript)]
    assert isinstance(acts[0], Pay) and acts[0] == acts[1]
    assert acts[0].to == load_genesis().names["USDT"]


async def test_a_chain_that_fails_is_not_the_script_s_fault(python: ScriptRunner) -> None:
    if find_anvil() is None:
        pytest.skip("Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
    chain = AnvilChain()
    quest = Quest(sample(shipped_tasks()[TRANSFER], 0), chain)
    quest.begin()
    chain._process.kill()
    script = "def execute_skill(chain, agent_address, deployed_contracts):\n    return {'held': chain.get_balance(agent_address)}"
    with pytest.raises(ChainError, match="cannot be reached"):
        await python.run(quest, script)
    chain.close()
    assert await run(python, script) == Found({"held": 100 * ETHER})


async def test_the_guides_name_what_there_is() -> None:
    for language, entry in (("python", "execute_skill"), ("typescript", "executeSkill")):
        guide = script_guide(language, GENESIS_TIME)  # type: ignore[arg-type]
        assert entry in guide and str(GENESIS_TIME) in guide and "T1363 0x71" in guide and "{{" not in guide
