"""Scripts that want more than their chain: each attempt fails or costs its own act, and the runner serves the next.

The sandbox's own walls are tried in `tests/sandbox`; here it is what a script of a quest finds: its chain's address,
its result, its helpers.
"""

# Programs inside texts keep their long lines.
# ruff: noqa: E501

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import httpx
import pytest

from shoal.envs.evm.actions import ActionError, Found, Pay
from shoal.envs.evm.anvil import AnvilChain
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.record import Record
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.scripts import ScriptRunner
from shoal.envs.evm.scripts.front import Front
from shoal.envs.evm.scripts.rpc import MAX_BODY_BYTES, RpcSession

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEAD = "def execute_skill(chain, agent_address, deployed_contracts):\n    "
HONEST = {
    "python": HEAD + "return {'to': agent_address, 'value': 1}",
    "typescript": "export async function executeSkill(url: string, me: string) { return { to: me, value: 1n }; }",
}
ATTEMPT = """
import os, socket, subprocess
def attempt(what, *args, **more):
    try: return f"ESCAPED {what(*args, **more)!r}"
    except Exception as error: return type(error).__name__
"""


async def run(runner: ScriptRunner, script: str, chain: ChainBackend | None = None) -> Pay | Found | ActionError:
    """What a script comes to; its chain must be as it was, whatever it did."""
    chain = chain or PyrevmChain()
    quest = Quest(sample(shipped_tasks()["erc20_transfer_fixed"], 0), chain)
    quest.begin()
    before = _state(chain)
    act = await runner.run(quest, script)
    assert _state(chain) == before
    quest.end()
    return act


def _state(chain: ChainBackend) -> tuple[object, ...]:
    usdt = load_genesis().names["USDT"]
    reads = chain.balance(AGENT), chain.nonce(AGENT), chain.code(AGENT), chain.code(usdt), chain.storage(usdt, 0)
    return (*reads, chain.block_number(), chain.timestamp(), len(chain.receipts()))


async def serves_on(runner: ScriptRunner) -> None:
    act = await run(runner, HONEST[runner.language])
    assert isinstance(act, Pay) and act.to == AGENT, act


async def found(runner: ScriptRunner, script: str, chain: ChainBackend | None = None) -> dict[str, object]:
    act = await run(runner, script, chain)
    assert isinstance(act, Found), act
    return dict(act.answer)


async def test_python_files_programs_and_environment(
    python: ScriptRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TEST_SECRET", "planted")
    (tmp_path / "secret").write_text("secret")
    script = ATTEMPT + HEAD + f"""
    return {{
        "secret": attempt(open, {str(tmp_path / "secret")!r}), "shadow": attempt(open, "/etc/shadow"),
        "home": attempt(os.listdir, "/home"), "root": attempt(os.listdir, "/root"), "work": attempt(os.listdir, {os.getcwd()!r}),
        "write": attempt(open, "/packages/eth_abi/abi.py", "w"), "artifacts": attempt(open, "/packages/artifacts.json", "a"),
        "guest": attempt(os.remove, "/packages/shoal/envs/evm/scripts/guest/chain.py"),
        "shell": attempt(subprocess.run, ["/bin/sh", "-c", "id"]), "system": str(os.system("id")),
        "python": attempt(subprocess.run, ["/usr/bin/python3"]), "sockets": str([n for n in os.listdir("/") if "shoal-scripts" in n]),
        "environment": "planted" in repr(os.environ), "user": os.getuid(),
    }}
"""  # fmt: skip
    got = await found(python, script)
    assert "ESCAPED" not in str(got), got
    assert got["system"] != "0" and got["sockets"] == "[]" and got["environment"] is False and got["user"] == 65534
    await serves_on(python)


async def test_python_network(python: ScriptRunner, anvil: ChainBackend) -> None:
    """Nothing answers but the chain's own address, and there no admin method does, whatever node is behind it."""
    assert isinstance(anvil, AnvilChain)
    port = httpx.URL(anvil.url).port
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.1)
        script = ATTEMPT + HEAD + f"""
    def connect(host, port):
        return socket.create_connection((host, port), timeout=2)
    names = ("127.0.0.1", "chain", "localhost", {socket.gethostbyname(socket.gethostname())!r})
    forged = ["anvil_setBalance", "anvil_reset", "evm_mine", "evm_revert", "hardhat_setCode", "debug_traceCall", "personal_sign", "eth_sendRawTransaction"]
    return {{
        "anvil": [attempt(connect, name, {port}) for name in names],
        "other": [attempt(connect, name, {other.getsockname()[1]}) for name in names],
        "outside": [attempt(connect, "1.1.1.1", 80), attempt(connect, "169.254.169.254", 80), attempt(socket.getaddrinfo, "example.com", 80)],
        "admin": [attempt(chain.request, method, [agent_address, "0x1"]) for method in forged],
    }}
"""  # fmt: skip
        got = await found(python, script, anvil)
        with pytest.raises(TimeoutError):
            other.accept()
    assert "ESCAPED" not in str(got), got
    assert set(got["admin"]) == {"ChainError"}  # type: ignore[call-overload]


async def test_typescript_files_programs_and_network(
    typescript: ScriptRunner, anvil: ChainBackend, tmp_path: Path
) -> None:
    assert isinstance(anvil, AnvilChain)
    (tmp_path / "secret").write_text("secret")
    script = f"""
import {{ ethers }} from "ethers";
const seen: Record<string, string> = {{}};
async function attempt(name: string, what: () => unknown) {{
  try {{ seen[name] = "ESCAPED " + String(await what()); }} catch (error) {{ seen[name] = (error as Error).constructor.name; }}
}}
export async function executeSkill(url: string, me: string, contracts: Record<string, string>) {{
  await attempt("secret", () => Deno.readTextFileSync({str(tmp_path / "secret")!r}));
  await attempt("passwd", () => Deno.readTextFileSync("/etc/passwd"));
  await attempt("run", () => new Deno.Command("/python/bin/python3", {{ args: ["-c", "1"] }}).outputSync());
  await attempt("ethers", () => Deno.writeTextFileSync("/node_modules/ethers/ethers.min.js", "x"));
  await attempt("anvil", () => fetch({anvil.url!r}, {{ method: "POST", body: "{{}}" }}));
  await attempt("port", () => fetch("http://chain:8546/"));
  await attempt("loopback", () => fetch("http://127.0.0.1:8545/"));
  await attempt("outside", () => fetch("http://1.1.1.1/"));
  await attempt("code", () => import("https://esm.sh/viem"));
  await attempt("package", () => import("npm:viem"));
  const provider = new ethers.JsonRpcProvider(url);
  for (const method of ["anvil_setBalance", "evm_mine", "hardhat_reset", "debug_traceCall", "personal_sign", "eth_sendRawTransaction"])
    await attempt(method, () => provider.send(method, [me, "0x1"]));
  return seen;
}}
"""
    got = await found(typescript, script, anvil)
    assert len(got) == 16 and "ESCAPED" not in str(got), got
    await serves_on(typescript)


HOSTILE_PYTHON = {
    "took too long": "while True: pass",
    "used too much memory": "x = []\n    while True: x.append(bytearray(1 << 20))",
    "wrote too much": "while True: print('x' * 4096)",
    "started too many processes": "import os\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "was killed": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize(
    "ending",
    [pytest.param(name, marks=pytest.mark.slow if number == 0 else ()) for number, name in enumerate(HOSTILE_PYTHON)],
)
async def test_a_hostile_python_script_costs_its_own_act(python: ScriptRunner, ending: str) -> None:
    act = await run(python, HEAD + HOSTILE_PYTHON[ending])
    assert isinstance(act, ActionError) and str(act) == f"the script {ending}"
    await serves_on(python)


HOSTILE_TYPESCRIPT = {
    "wrote too much": "while (true) console.log('x'.repeat(4096));",
    "took too long": "while (true) {}",
    "used too much memory": "const x: unknown[] = []; while (true) x.push(new Array(1e5).fill(Math.random()));",
}


@pytest.mark.parametrize(
    "ending",
    [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(HOSTILE_TYPESCRIPT)],
)
async def test_a_hostile_typescript_script_costs_its_own_act(typescript: ScriptRunner, ending: str) -> None:
    act = await run(typescript, f"export async function executeSkill() {{ {HOSTILE_TYPESCRIPT[ending]} }}")
    assert isinstance(act, ActionError) and str(act) == f"the script {ending}"
    await serves_on(typescript)


FORGED = {
    "huge result": "return {'x': 'y' * 3_000_000}",
    "huge file": "open('result.json', 'w').write('{' * 3_000_000); os._exit(0)",
    "many fields": "return {str(n): n for n in range(10_000)}",
    "deep": "x = {}\n    for _ in range(900): x = {'x': x}\n    return x",
    "link": "os.symlink('/etc/passwd', 'result.json'); os._exit(0)",
    "folder": "os.mkdir('result.json'); os._exit(0)",
    "pipe": "os.mkfifo('result.json'); os._exit(0)",
    "nothing": "os._exit(0)",
    "no object": "open('result.json', 'w').write('[1]'); os._exit(0)",
    "no value": "open('result.json', 'w').write('{}'); os._exit(0)",
    "an act's form": "return {'action': 'submit', 'to': 5}",
    "the supervisor's form": "print({'exit_code': 0, 'reason': 'ok'}); os._exit(7)",
    "descriptors": "[os.write(n, b'forged') for n in range(3, 64) if os.path.exists(f'/proc/self/fd/{n}')]; os._exit(0)",
    "other sender": "return {'from': deployed_contracts['USDT'], 'to': None, 'data': '0x00'}",
}


async def test_forged_results_are_read_as_what_they_are(python: ScriptRunner) -> None:
    for name, body in FORGED.items():
        act = await run(python, f"import os\n{HEAD}{body}")
        assert isinstance(act, ActionError) and len(str(act)) < 600, (name, act)
    # The helpers are in a script's reach: what it makes of them is its own result, and gone with it.
    forger = "import os\nopen('result.json', 'w').write('{\"value\": {\"a\": 1}}')\nos._exit(0)"
    assert await run(python, forger) == Found({"a": 1})
    await serves_on(python)


async def test_a_flood_of_questions_is_bounded(python: ScriptRunner) -> None:
    script = ATTEMPT + HEAD + f"""
    import threading
    def raw(data):
        with socket.create_connection(("chain", 8545), timeout=3) as s:
            s.sendall(data)
            return s.recv(100).split(b"\\r\\n")[0].decode()
    answers = []
    for data in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"\\x00" * 70_000, b"POST /x HTTP/1.1\\r\\ncontent-length: {MAX_BODY_BYTES + 1}\\r\\n\\r\\n",
                 b"POST / HTTP/1.1\\r\\ncontent-length: -1\\r\\n\\r\\n", b"POST /../chain HTTP/1.1\\r\\ncontent-length: 2\\r\\n\\r\\n{{}}",
                 b"POST / HTTP/1.1\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n"):
        try: answers.append(raw(data))
        except OSError as error: answers.append(type(error).__name__)
    asked = 0
    try:
        while True:
            chain.get_balance(agent_address)
            asked += 1
    except Exception as error:
        refused = str(error)
    held = []
    for _ in range(150): held.append(socket.create_connection(("chain", 8545), timeout=3))
    return {{"answers": answers, "asked": asked, "refused": refused, "held": len(held)}}
"""  # fmt: skip
    got = await found(python, script)
    assert got["asked"] == 512 and "may ask" in str(got["refused"])
    assert not [answer for answer in got["answers"] if "200" in str(answer)], got  # type: ignore[union-attr, attr-defined]
    await serves_on(python)


async def test_a_path_is_served_while_its_script_runs_and_no_longer(tmp_path: Path) -> None:
    front = Front(max_connections=2)
    await front.open(tmp_path / "chain.socket")
    try:
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "chain.socket"))
        async with httpx.AsyncClient(transport=transport, base_url="http://chain") as client:
            body = json.dumps({"id": 1, "method": "eth_chainId"})
            token = front.admit(RpcSession(PyrevmChain(), Record()))
            assert (await client.post(f"/{token}", content=body)).json()["result"] == "0x38"
            for path in ("/", "/guess", f"/{token}/x", f"/{token[:-1]}", f"/{token}?x=1"):
                assert (await client.post(path, content=body)).status_code == 404
            assert (await client.get(f"/{token}")).status_code == 400
            front.dismiss(token)
            assert (await client.post(f"/{token}", content=body)).status_code == 404
    finally:
        await front.close()
