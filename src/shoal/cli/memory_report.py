"""What a run would take of this machine's memory, and what there is: the second half of `--dry-run`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from shoal.config import Config
from shoal.learner.memory import GIB, check_fits, learner_bytes, shape_of, worker_bytes

ON_HOST = ("snapshot", "runtime", "arriving")
"""Parts that are in the machine's own memory, also where a GPU computes."""


def memory_of(config: Config) -> dict[str, Any] | None:
    """GiB by part, for the learner and for one worker, and what is there; None where the model's sizes are unknown."""
    shape = shape_of(config.model.name)
    if shape is None:
        return None
    colocated = config.learner.mode == "colocated"
    count = 1 if colocated else config.workers.count
    learner, worker = learner_bytes(config, shape), worker_bytes(config, shape)
    if colocated:
        worker = {part: size for part, size in worker.items() if part != "runtime"}
    on_gpu = {"learner": _uses_gpu(config.learner.device), "worker": _uses_gpu(config.workers.device)}
    host = gpu = 0
    ranks = config.learner.processes
    for name, parts, times in (("learner", learner, ranks), ("worker", worker, count)):
        outside = sum(size for part, size in parts.items() if on_gpu[name] and part not in ON_HOST)
        gpu += outside if name == "learner" else times * outside  # each of the learner's processes has a GPU of its own
        host += times * (sum(parts.values()) - outside)
    host -= (ranks - 1) * learner["snapshot"]  # only one publishes
    there = {"host": _host_bytes(), "gpu": _gpu_bytes() if gpu else 0}
    return {
        "parameters": shape.parameters,
        "learner": {part: size / GIB for part, size in learner.items()},
        "processes": ranks,
        "worker": {part: size / GIB for part, size in worker.items()},
        "workers": count,
        "needed": {"host": host / GIB, "gpu": gpu / GIB},
        "there": {where: size / GIB for where, size in there.items()},
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """The same for people."""

    def parts(of: dict[str, float]) -> str:
        return ", ".join(f"{part} {size:.2f}" for part, size in of.items() if size) + f" = {sum(of.values()):.2f}"

    needed, there, ranks = found["needed"], found["there"], found["processes"]
    learner = "learner" if ranks == 1 else f"each of the learner's {ranks} processes"
    lines = [
        f"memory in GiB, estimated for {found['parameters'] / 1e6:.0f} M parameters",
        f"{learner}: {parts(found['learner'])}",
        f"each of {found['workers']} workers: {parts(found['worker'])}",
        f"this machine: {needed['host']:.1f} of {there['host']:.1f}",
    ]
    return [*lines, f"GPU: {needed['gpu']:.1f} of {there['gpu']:.1f}"] if needed["gpu"] else lines


def refuse(found: dict[str, Any]) -> None:
    """Raise `CapacityError` where it can't fit."""
    for where, words in (("host", "this machine's memory"), ("gpu", "the GPU's memory")):
        if found["there"][where]:
            check_fits(int(found["needed"][where] * GIB), int(found["there"][where] * GIB), words)


def _uses_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and _gpu_bytes() > 0)


def _host_bytes() -> int:
    """0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _gpu_bytes() -> int:
    """Of the first GPU; 0 where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    first = answer.stdout.strip().splitlines()[:1]
    return int(float(first[0]) * 2**20) if answer.returncode == 0 and first else 0
