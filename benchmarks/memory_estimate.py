"""Is the learner's memory what `shoal train --dry-run` says? Steps of the embedded model, measured in own processes.

    shoal bench memory_estimate --json
    shoal bench memory_estimate -- --only adamw8bit

Each row is one process that loads the policy as the learner does (bf16, with a reference model), makes a version from
full micro-batches, publishes it, and does so again; `measured` is the most that was resident (VmHWM), in GiB.

    worst_error           largest |predicted / measured − 1| over the rows
    loss_apart            difference of the two optimizers' last losses over the fall of the first (4 steps, same batch)
    optimizer_saved_gib   what 8-bit moments save, measured

Two to four minutes on a quiet machine, 7 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shoal.errors import RunError

from _common import benchmark, emit

STEPS = 4
GROUPS, SIZE, PROMPT, REPLY = 4, 8, 40, 27
"""992 input tokens: one full micro-batch, or two of half the size."""
ROWS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "checkpointing": {"optimizer": "adamw", "gradient_checkpointing": True},
    "microbatch512": {"optimizer": "adamw", "microbatch_tokens": 512},
}


def peak_gib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise RunError("This machine does not say how much memory a process had.")


def measure(name: str) -> dict[str, Any]:
    """In a process of its own: one row."""
    from shoal.broadcast.publisher import SnapshotWriter
    from shoal.broadcast.store import Store
    from shoal.config import config_from
    from shoal.engine.source import resolve
    from shoal.engine.weights import to_views
    from shoal.fabric.identity import Identity
    from shoal.learner.loading import load_policy
    from shoal.learner.memory import GIB, learner_bytes, shape_of
    from shoal.learner.trainer import Trainer
    from shoal.protocol.episode import Episode, Task, Turn
    from shoal.protocol.sampling import Completion
    from shoal.rollout.host import model_cache

    learner = {"device": "cpu", "loss": {"type": "grpo", "kl_beta": 0.1, "eps_high": 10.0}, **ROWS[name]}
    config = config_from({"envs": {"a": {"type": "arithmetic"}}, "learner": learner, "model": {"name": "embedded"}})
    shape = shape_of("embedded")
    assert shape is not None
    rng = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40_000) for _ in range(count))

    episodes = []
    for group in range(GROUPS):
        prompt = ids(PROMPT)
        for index in range(SIZE):
            reply = ids(REPLY)
            completion = Completion(
                token_ids=reply, logprobs=(-11.0,) * REPLY, versions=(0,) * REPLY, finish="stop", text=""
            )
            episodes.append(
                Episode(
                    id=f"{group}/{index}",
                    group=str(group),
                    index=index,
                    task=Task(env="a", id="1", seed=0),
                    turns=(Turn(context_ids=prompt, observation="", completion=completion),),
                    outcome="done",
                    reward=float(index % 2),
                )
            )
    trainer = Trainer(load_policy(resolve("embedded", model_cache()), "bf16", "cpu"), config.learner)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        identity = Identity.generate()
        store = Store(Path(folder), run="r", trusted_key=identity.public_key, durable=False)
        writer = SnapshotWriter(store, identity, "policy")
        writer.write(0, to_views(trainer.tensors()))
        for step in range(STEPS):
            losses.append(trainer.step(episodes)["loss"])
            if step in (0, STEPS - 1):
                writer.write(trainer.version, to_views(trainer.tensors()))
    parts = learner_bytes(config, shape)
    predicted, measured = sum(parts.values()) / GIB, peak_gib()
    return {
        "row": name,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **{f"predicted_{part}": value / GIB for part, value in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--measure", choices=list(ROWS), help="this row, here; its result on standard output")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    rows = []
    for name in given.only:
        print(f"memory_estimate: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--measure", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=False, env=environment)
        if done.returncode != 0:
            raise RunError(f"The row {name} ended with {done.returncode}.", "Its own words are above.")
        rows.append(json.loads(done.stdout))
        print(f"memory_estimate: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    by_name = {row["row"]: row for row in rows}
    headline = {"worst_error": max(abs(row["error"]) for row in rows)}
    if {"adamw", "adamw8bit"} <= by_name.keys():
        full, small = by_name["adamw"], by_name["adamw8bit"]
        headline["loss_apart"] = abs(full["last_loss"] - small["last_loss"]) / abs(
            full["first_loss"] - full["last_loss"]
        )
        headline["optimizer_saved_gib"] = full["measured"] - small["measured"]
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
