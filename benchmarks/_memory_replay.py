"""Greedy fp32 episodes, packed in one process and sampled again in another: the same tokens, the same rewards?

Half of the episodes are given notes. `python _memory_replay.py MODEL CONTEXTS` is the other process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.envs.registry import make
from shoal.errors import RunError
from shoal.memory.recall import compose
from shoal.memory.recalling import Noting, noted
from shoal.memory.records import Context, Entry, Provenance, World
from shoal.memory.replay import Sampled, context_of, replay, weights_hash
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.host import model_cache

CONTEXT_TOKENS = 1024
WAIT_S = 1800

KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "arithmetic": ("arithmetic", {}, 48),
    "tools": ("shoal.agents.environment:ToolUse", {"constrain": "seen", "max_turns": 3}, 64),
    "evm": ("evm", {"groups": ["native"], "prompt": "brief", "constrain": "seen"}, 96),
}
NOTE = "Look at the numbers in the question before you answer, and name the tool that fits."


def engine_of(model: str) -> tuple[LocalEngine, str]:
    local = resolve(model, model_cache())
    engine = LocalEngine(
        local, dtype="fp32", device="cpu", max_sequences=8, cache_tokens=8192, context_tokens=CONTEXT_TOKENS
    )
    return engine, weights_hash(local.directory)


async def packed(model: str, count: int) -> list[Context]:
    """`count` episodes of each kind."""
    engine, weights = engine_of(model)
    found: list[Context] = []
    async with engine:
        for name, (kind, settings, max_tokens) in KINDS.items():
            env, world = make(kind, settings, name=name), World(kind=kind, settings=settings)
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
            entry = Entry(text=NOTE, family=name, provenance=Provenance(rule="manual"))
            block = compose([entry], max_tokens=256, count_tokens=lambda text: len(engine.tokenizer.encode(text)))
            for number in range(count):
                task = noted(env.task("train", number, 5), block.text if number % 2 else "")
                spec = EpisodeSpec("e", "e", number, task, params)
                episode = await run_episode(
                    spec, engine, engine.tokenizer, Noting(env.fresh()), context_tokens=CONTEXT_TOKENS
                )
                context = await context_of(episode, env, world, Sampled(params, CONTEXT_TOKENS, weights))
                found.append(context)
    return found


async def again(model: str, contexts: list[Context]) -> list[dict[str, Any]]:
    """Each sampled once more, the integrity of what came checked first."""
    engine, weights = engine_of(model)
    rows = []
    async with engine:
        for context in contexts:
            assert context.world is not None
            env = make(context.world.kind, context.world.settings, name=context.task.env)
            done = await replay(context, env, engine, engine.tokenizer)
            rows.append(
                {
                    "id": context.id,
                    "kind": context.task.env,
                    "weights": weights == context.model,
                    "identical": done.identical,
                    "reward": done.run.reward == context.reward,
                    "turns": len(done.episode.turns),
                    "notes": bool(context.recalled),
                }
            )
    return rows


def replayed(model: str, count: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pack here, sample again there; the share that is identical."""
    contexts = asyncio.run(packed(model, count))
    with tempfile.TemporaryDirectory(prefix="shoal-replay-") as scratch:
        path = Path(scratch) / "contexts.jsonl"
        path.write_bytes(b"".join(to_json(context) + b"\n" for context in contexts))
        done = subprocess.run(
            [sys.executable, __file__, model, str(path)], stdout=subprocess.PIPE, timeout=WAIT_S, check=False
        )
    if done.returncode != 0:
        raise RunError("The process that was to replay failed.", "Its own output above says why.")
    found = json.loads(done.stdout)
    for kind in KINDS:
        some = [one for one in found if one["kind"] == kind]
        same = sum(one["identical"] and one["reward"] for one in some)
        turns = sum(one["turns"] for one in some) / len(some)
        rows.append({"part": "replay", "case": kind, "count": len(some), "identical": same, "turns": turns})
    good = [one["identical"] and one["reward"] and one["weights"] for one in found]
    hashes = [one["id"] == context.id for one, context in zip(found, contexts, strict=True)]
    return {"replay_identical": sum(good) / len(good), "input_hashes_equal": sum(hashes) / len(hashes)}


if __name__ == "__main__":
    given = [from_json(line, Context) for line in Path(sys.argv[2]).read_bytes().splitlines()]
    print(json.dumps(asyncio.run(again(sys.argv[1], given))))
