"""vLLM's own server as a child of this worker: found, started, watched, ended.

It lives in a Python environment of its own, because it pins other versions than ours, and is never patched. It listens
on a socket file in a folder that only this user can enter, since the interface that takes weights asks nobody who he
is. Invariants: leaving `serving` ends it and all that it has started (`vllm_guard`), and so does this process's death,
however it dies; waiting for it to start ends when it has said nothing for `SILENT_S`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shoal.errors import ModelError

VARIABLE = "SHOAL_VLLM_PYTHON"
GUARD = Path(__file__).with_name("vllm_guard.py")

MODEL = "policy"
"""What the server calls the model."""

SILENT_S = 600.0
"""A server that starts compiles for minutes, and says so; one that says nothing for so long is stuck."""

LOOK_S = 0.2

END_S = 20.0
"""The guard ends within its own grace; what has not by then is killed, upon which the server dies with it."""

TAIL_BYTES = 64 * 2**10

GIB = 2**30


@dataclass(frozen=True)
class VllmOptions:
    """What the machine's owner decides about it."""

    python: str = ""
    """The Python of the environment that holds vLLM; empty: `SHOAL_VLLM_PYTHON`, or this very Python."""
    arguments: tuple[str, ...] = ()
    """Further arguments of its server, after ours."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    client: httpx.AsyncClient
    folder: Path
    """Its socket's and its log's; weights on their way to it lie here as well."""
    process: asyncio.subprocess.Process

    @property
    def trouble(self) -> str:
        """Why it does not answer any more, as far as it said."""
        code = self.process.returncode
        ended = "does not answer" if code is None else f"ended with exit code {code}"
        return f"vLLM {ended}: {_last_line(self.folder / 'vllm.log')}"


def find_python(options: VllmOptions) -> str:
    """A Python that has vLLM.

    Raises:
        ModelError: none is named, and this one has it not; or what is named is not there.
    """
    named = options.python or os.environ.get(VARIABLE, "")
    if not named and importlib.util.find_spec("vllm") is not None:
        return sys.executable
    if not named:
        raise ModelError(
            "--engine vllm needs an environment that holds vLLM.",
            f"Make one (python -m venv; pip install vllm) and name its Python: --vllm-python PATH, or {VARIABLE}.",
        )
    found = shutil.which(named)
    if found is None:
        raise ModelError(f"there is no Python {named}.", f"Name one that has vLLM: --vllm-python PATH, or {VARIABLE}.")
    return found


def command_of(
    python: str,
    model: Path,
    socket: Path,
    *,
    dtype: str,
    on_cpu: bool,
    context_tokens: int,
    max_sequences: int,
    more: Sequence[str] = (),
) -> list[str]:
    """vLLM's server over the checkpoint in a folder.

    Log-probabilities are those after temperature and masks, since tokens are drawn from these; the checkpoint's own
    defaults of sampling (top-p and the like) are left out, since the learner knows nothing of them.
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL, "--uds", str(socket), "--generation-config", "vllm"]
    command += ["--dtype", {"bf16": "bfloat16", "fp32": "float32"}[dtype], "--max-model-len", str(context_tokens)]
    command += ["--max-num-seqs", str(max_sequences), "--logprobs-mode", "processed_logprobs"]
    command += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    command += ["--enforce-eager"] if on_cpu else []  # compiling gains little there, and takes minutes
    return [*command, *more]


def environment_of(python: str, *, on_cpu: bool, threads: int, cache_bytes: int) -> dict[str, str]:
    """What the server's processes find in their environment."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    own |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    own["PYTHONSAFEPATH"] = "1"  # nothing of where the worker was started is imported
    own["PATH"] = f"{Path(python).parent}{os.pathsep}{own.get('PATH', '')}"
    if not on_cpu:
        return own
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    own["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(cache_bytes / GIB)))
    openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
    if openmp.exists():  # which vLLM's CPU build brings; without it a step takes ten times as long
        own["LD_PRELOAD"] = os.pathsep.join(filter(None, [own.get("LD_PRELOAD"), str(openmp)]))
        own["KMP_BLOCKTIME"] = "1"  # idle threads sleep: others compute on this machine
    return own


@asynccontextmanager
async def serving(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> AsyncIterator[Server]:
    """The server, answering, while inside.

    Args:
        folder: with the socket `vllm.sock`, for this user only (`private_folder`).

    Raises:
        ModelError: it ended, or said nothing for too long, before it answered.
    """
    with (folder / "vllm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            command[0],
            str(GUARD),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
        )
    transport = httpx.AsyncHTTPTransport(uds=str(folder / "vllm.sock"), limits=httpx.Limits(max_connections=None))
    client = httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=httpx.Timeout(None))
    server = Server(client, folder, process)
    try:
        await _until_it_answers(server)
        yield server
    finally:
        await client.aclose()
        await _end(process)


@asynccontextmanager
async def private_folder() -> AsyncIterator[Path]:
    """A folder that only this user can enter, with a short name (a socket's path has at most 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-vllm-"))
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _until_it_answers(server: Server) -> None:
    log = server.folder / "vllm.log"
    loop = asyncio.get_running_loop()
    size, heard_at = 0, loop.time()
    while True:
        if server.process.returncode is not None:
            raise ModelError(server.trouble, "See --debug for its log; try the same environment by hand.")
        try:
            if (await server.client.get("/health", timeout=5.0)).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not yet
        if (now_size := log.stat().st_size) != size:
            size, heard_at = now_size, loop.time()
        elif loop.time() - heard_at > SILENT_S:
            raise ModelError(f"vLLM said nothing for {SILENT_S:.0f} s while it started: {_last_line(log)}")
        await asyncio.sleep(LOOK_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close the guard's pipe, upon which it ends everything."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _last_line(log: Path) -> str:
    """The end of what it said; of tracebacks the error itself, and not those that only say that there was one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return "it said nothing"
    told = [line.strip() for line in lines if line.strip()]
    errors = [line for line in told if "Error: " in line and "EngineCore encountered" not in line]
    return (errors or told or ["it said nothing"])[-1][-500:]


def cache_bytes_of(config: Mapping[str, Any], tokens: int, width: int) -> int:
    """What a key-value cache of so many tokens takes, by a checkpoint's `config.json`."""
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    keys = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * keys * dim * width * tokens
