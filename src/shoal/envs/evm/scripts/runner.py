"""Runs scripts: warm sandboxes of one language, a front for their chains, and the act that each script comes to.

A Python script runs in a fresh fork of an interpreter that has the chain's interface imported; a TypeScript one in a
Deno process that has started and imported ethers, and that ends with it.

Invariants: a script's chain is the quest's own, readable while the script runs and not before or after; a script that
fails, hangs or floods costs its own act; a chain or a sandbox that fails is raised, never blamed on the script.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import AsyncExitStack, suppress
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from types import TracebackType

from eth_utils.address import to_checksum_address

from shoal.envs.evm.actions import ActionError, Found, Pay
from shoal.envs.evm.genesis import AGENT, AGENT_KEY, load_genesis
from shoal.envs.evm.official import CONTRACTS
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.scripts.ethers import ethers_folder
from shoal.envs.evm.scripts.front import Front
from shoal.envs.evm.scripts.outcome import one_line, read_outcome
from shoal.envs.evm.scripts.reply import MAX_SCRIPT_CHARS, Language
from shoal.envs.evm.scripts.rpc import RpcSession
from shoal.sandbox import DenoRuntime, Job, Limits, PythonRuntime, Relay, Result, Setup, WorkerPool
from shoal.sandbox.relay import MAX_CONNECTIONS

HOST, PORT = "chain", 8545
"""The one address in a script's sandbox."""

DEFAULT_WORKERS = 2
LIMITS: dict[Language, Limits] = {
    "python": Limits(
        wall_s=15, cpu_s=5, memory_bytes=256 << 20, processes=8, output_bytes=64 << 10, scratch_bytes=4 << 20
    ),
    "typescript": Limits(
        wall_s=20, cpu_s=10, memory_bytes=384 << 20, processes=40, output_bytes=64 << 10, scratch_bytes=16 << 20
    ),
}

DISTRIBUTIONS = (
    "annotated-types",
    "cytoolz",
    "eth-abi",
    "eth-hash",
    "eth-keys",
    "eth-typing",
    "eth-utils",
    "parsimonious",
    "pycryptodome",
    "pydantic",
    "pydantic-core",
    "regex",
    "toolz",
    "typing-extensions",
    "typing-inspection",
)
"""What a Python script can import beside the standard library: eth-abi, eth-keys, eth-utils and what they need."""

_GUEST = "shoal.envs.evm.scripts.guest"
_PYTHON_MAIN = f"from {_GUEST}.script_main import main\nmain()\n"
_RESULT = "result.json"


class ScriptRunner:
    """Use as `async with ScriptRunner("python") as runner`; safe for many quests at once.

    Args:
        workers: how many scripts run at once; others wait.
        limits: of one script; `LIMITS` by default.
    """

    def __init__(self, language: Language, *, workers: int = DEFAULT_WORKERS, limits: Limits | None = None) -> None:
        self.language: Language = language
        self._limits = limits or LIMITS[language]
        self._workers = workers
        self._stack = AsyncExitStack()
        # Whatever one script holds open, the others' connections find their place.
        self._front = Front(max_connections=MAX_CONNECTIONS * workers)
        self._pool: WorkerPool | None = None

    async def __aenter__(self) -> ScriptRunner:
        """Starts the front and the workers.

        Raises:
            SandboxUnavailable, SandboxError: this machine cannot run sandboxes, or not this one.
            RunError: ethers is not here and cannot be fetched.
        """
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-scripts-")))
            socket = folder / "chain.socket"
            await self._front.open(socket)
            stack.push_async_callback(self._front.close)
            setup = _python_setup(socket) if self.language == "python" else _typescript_setup(socket)
            self._pool = await stack.enter_async_context(WorkerPool(setup, self._limits, size=self._workers))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def run(self, quest: Quest, script: str) -> Pay | Found | ActionError:
        """What the script wants done, for `quest.act`. What it reads of the chain goes into the quest's record.

        Args:
            quest: has begun; nothing else may use its chain meanwhile.
            script: the module's text, as `find_script` gives it.

        Raises:
            ChainError: the chain failed under the script.
            SandboxError, SandboxUnavailable: no sandbox could be had.
        """
        assert self._pool is not None, "a runner is opened before it runs"
        if len(script) > MAX_SCRIPT_CHARS:
            return ActionError(f"the script has more than {MAX_SCRIPT_CHARS} characters")
        session = RpcSession(quest.chain, quest.record)
        token = self._front.admit(session)
        try:
            result = await self._pool.run(self._job(script, token))
        finally:
            self._front.dismiss(token)
        if session.failure is not None:
            raise session.failure
        try:
            return _act(result)
        except ActionError as error:
            return error

    def _job(self, script: str, token: str) -> Job:
        task = {
            "url": f"http://{HOST}:{PORT}/{token}",
            "host": HOST,
            "port": PORT,
            "path": f"/{token}",
            "agent": to_checksum_address(AGENT),
            # Public on purpose, like every development chain's first account: permits are signed with it.
            "key": "0x" + AGENT_KEY.hex(),
            "contracts": deployed_contracts(),
            "kinds": _kinds(),
        }
        text = script.encode("utf-8", "replace")
        files = {"task.json": json.dumps(task).encode()}
        if self.language == "python":
            return Job(source=_PYTHON_MAIN, files={**files, "skill.py": text}, collect=(_RESULT,))
        return Job(source=_typescript_main(), files={**files, "skill.ts": text}, collect=(_RESULT,))


@lru_cache(maxsize=1)
def deployed_contracts() -> dict[str, str]:
    """Address of every contract: by our name, and by the benchmark's where it has another."""
    names = load_genesis().names
    found = {**names, **{theirs: names[ours] for theirs, ours in CONTRACTS.items()}}
    return {name: to_checksum_address(address) for name, address in found.items()}


@lru_cache(maxsize=1)
def _kinds() -> dict[str, str]:
    # Whoever talks to the proxy talks through it.
    return {a: "Implementation" if kind == "Proxy" else kind for a, kind in load_genesis().kinds.items()}


@lru_cache(maxsize=1)
def _typescript_main() -> str:
    return resources.files(_GUEST).joinpath("skill.ts").read_text(encoding="utf-8")


def _relays(socket: Path) -> tuple[Relay, ...]:
    return (Relay(HOST, PORT, socket),)


def _typescript_setup(socket: Path) -> Setup:
    return Setup(DenoRuntime(node_modules=ethers_folder(), preload=("ethers",)), relays=_relays(socket))


def _python_setup(socket: Path) -> Setup:
    guest = Path(str(resources.files(_GUEST)))
    shown = {f"/packages/{_GUEST.replace('.', '/')}": guest}
    shown["/packages/artifacts.json"] = Path(str(resources.files("shoal.envs.evm.contracts"))) / "artifacts.json"
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):  # Not every version of the others needs each of them.
            found = metadata.distribution(name)
            tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            shown.update({f"/packages/{top}": Path(str(found.locate_file(top))) for top in tops})
    runtime = PythonRuntime(packages=(guest,), preload=("packages_path", f"{_GUEST}.script_main", f"{_GUEST}.warm"))
    return Setup(runtime, read_only=shown, relays=_relays(socket))


_BROKEN = {
    "time": "took too long",
    "memory": "used too much memory",
    "processes": "started too many processes",
    "output": "wrote too much",
    "killed": "was killed",
}


def _act(result: Result) -> Pay | Found:
    """The act in a script's result; raises `ActionError`."""
    if result.reason in _BROKEN:
        raise ActionError(f"the script {_BROKEN[result.reason]}")
    content = result.files.get(_RESULT)
    if content is None:
        # It ended by itself, or could not even be read as a program: its last words are all there is.
        said = one_line(result.stderr.decode("utf-8", "replace")[-1_000:])
        raise ActionError(f"the script returned nothing: {said or 'it ended without a word'}")
    return read_outcome(content)
