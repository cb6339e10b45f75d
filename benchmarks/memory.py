"""Does memory earn its place? Planted truths through admission and use, retrieval of a million vectors, kills.

Three parts have no model. `planted`: memories whose effect on a noisy reward is known (base 0.5, reward 0 or 1) go
through the keeper: screening, trials, the sequential test, a budget; then 10^4 uses. The worlds are simulated, the
memory room is the real one. `retrieval`: clustered unit vectors with weights, against the exact product. `store`: a
writer killed again and again, and how long adding and opening take. One thread; every figure is also taken in
processor time (`_cpu`), because others use this machine. About four minutes; `-- --quick` takes one.

With a model: `replay`: greedy fp32 episodes packed here and sampled again in another process (two minutes, part of the
default). `-- --only families --folder F`: real tasks with seven ways of remembering (`_memory_families`), at most
`--minutes`, and on in the same folder. `-- --only public`: LoCoMo, HotpotQA and FEVER under `SHOAL_DATA`
(`_memory_public`); needs no model.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from _memory_families import ROWS, play_families
from _memory_planted import planted, power, say
from _memory_public import public
from _memory_replay import replayed
from _memory_stores import retrieval, stored
from _memory_summary import summary
from _memory_worlds import FAMILIES
from shoal.errors import RunError

from _common import benchmark, emit

PARTS = ("planted", "retrieval", "store", "replay", "families", "public")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=PARTS, nargs="+", action="extend")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=10, help="planted memories of each kind, in units")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="of the families; a second call goes on in it")
    parser.add_argument("--family", choices=tuple(FAMILIES), nargs="+", action="extend")
    parser.add_argument("--row", choices=ROWS, nargs="+", action="extend", help="ways of remembering; by default all")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tools-model", default="", help="the model for tool use, such as a run's")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--minutes", type=float, default=60.0, help="the families stop after this, and can go on")
    parser.add_argument("--questions", type=int, default=0, help="of each public set; 0 for all")
    parser.add_argument("--answer", default="", help="a model that answers the public sets; none: evidence alone")
    arguments = parser.parse_args()
    parts = arguments.only or ["planted", "retrieval", "store", "replay"]
    quick = arguments.quick
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-memory-") as scratch:
        folder = Path(scratch)
        if "planted" in parts:
            headline |= planted(folder / "planted", 3 if quick else arguments.scale, arguments.seed, rows)
            say("how often an effect is found")
            power(rows, 20 if quick else 200)
        if "retrieval" in parts:
            say("retrieval")
            headline |= retrieval(folder, 50_000 if quick else arguments.vectors, rows)
        if "store" in parts:
            say("a store whose writer is killed")
            headline |= stored(folder, 3 if quick else 20, 5_000 if quick else 100_000, rows)
        if "replay" in parts:
            say("replay")
            headline |= replayed(arguments.model, 4 if quick else 16, rows)
    if "public" in parts:
        headline |= public(rows, questions=arguments.questions, model=arguments.answer, folder=arguments.folder)
    if "families" in parts:
        if arguments.folder is None:
            raise RunError("The families need a folder that they can go on in.", "Give -- --only families --folder F.")
        names = arguments.family or list(FAMILIES)
        played = play_families(
            arguments.folder,
            names,
            model=arguments.model,
            tools_model=arguments.tools_model or arguments.model,
            rows=arguments.row or ROWS,
            minutes=arguments.minutes,
            scale=0.25 if quick else 1.0,
            dtype=arguments.dtype,
        )
        asyncio.run(played)
        found, said = summary(arguments.folder, names)
        rows += found
        headline |= said
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
