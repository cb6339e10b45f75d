"""Real tasks with and without memory: experience, admission, use, test, one folder that can be continued.

    experience   sampled at temperature 1.5, no notes: what all memories are made of
    admission    worked examples of rewarded runs, tried on siblings (`memory.trials`), in one store for all families
    use          greedy, with notes; each use's worth is the reward less the same task's without
    test         held-out tasks, greedy, one row a way of remembering, all with the same longest block of notes

Rows: `none`; `full` (the newest of everything, as much as the context takes); `newest` (the newest K runs); `vector`
(the K runs that are most like the question); `mem0` (the same, out of process); `admission` (admitted memories by
likeness alone); `sedm` (admitted memories by likeness times weight). What the first ones keep is every run with its
reward.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from msgspec.structs import replace

from _memory_mem0 import Mem0
from _memory_worlds import FAMILIES, Family
from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.envs.base import Environment, stable_int
from shoal.envs.registry import make
from shoal.memory.admission import Decision
from shoal.memory.embedding import HashedEmbedder
from shoal.memory.keeper import Keeper
from shoal.memory.learning import asked, learn
from shoal.memory.recall import compose
from shoal.memory.recalling import Noting, asked_in, noted
from shoal.memory.records import Context, Entry, Provenance, World
from shoal.memory.replay import ReplayVoid, Sampled, context_of, weights_hash
from shoal.memory.trials import Arena, admit
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.host import model_cache

ROWS = ("none", "full", "newest", "vector", "mem0", "admission", "sedm")
K = 3
"""Runs or memories in a block, at most."""

LIKENESS = 0.4
"""Below this the embedder's cosine says that two texts are about different things; for `vector` as for ours."""

NOTE_TOKENS = 320
FULL_TOKENS = 1200
CONTEXT_TOKENS = 2048
AT_ONCE = 16
CANDIDATES = 2
"""Worked examples that are tried of each template, best first, until one is admitted."""

EXPLORE = 1.5
"""Temperature of the experience: a choice that is never made is never learnt."""

MOST_TRIALS = 160
"""Of a candidate: facts that decide show sooner."""


class OutOfTime(Exception):
    """The time is used up; what there is stays."""


@dataclass
class Bench:
    """One sitting.

    Args:
        folder: what there is of it, and where it goes on.
        ends: by `time.monotonic`.
    """

    folder: Path
    keeper: Keeper
    engine: LocalEngine
    model: str
    ends: float
    scale: float = 1.0
    rows: Sequence[str] = ROWS

    async def play(self, env: Environment, tasks: Sequence[Task], params: SamplingParams) -> list[Episode]:
        """Episodes of tasks, a batch at a time; the parameters' seed is spread over them."""

        async def one(number: int, task: Task) -> Episode:
            seed = stable_int("play", params.seed, number, task.id)
            spec = EpisodeSpec("e", "e", number, task, replace(params, seed=seed))
            inner = Noting(env.fresh())
            return await run_episode(spec, self.engine, self.engine.tokenizer, inner, context_tokens=CONTEXT_TOKENS)

        played: list[Episode] = []
        for start in range(0, len(tasks), 2 * AT_ONCE):
            self.check_time()
            batch = tasks[start : start + 2 * AT_ONCE]
            played += await asyncio.gather(*(one(start + n, task) for n, task in enumerate(batch)))
        return played

    def check_time(self) -> None:
        if time.monotonic() > self.ends:
            raise OutOfTime

    def count(self, text: str) -> int:
        return len(self.engine.tokenizer.encode(text))


async def run_family(bench: Bench, family: Family) -> None:
    """Play one family as far as there is time."""
    world = World(kind=family.kind, settings=family.settings)
    env = make(family.kind, family.settings, name=family.name)
    folder = bench.folder / family.name
    folder.mkdir(parents=True, exist_ok=True)
    greedy = SamplingParams(max_tokens=family.max_tokens, temperature=0.0)
    contexts = await experience(bench, family, env, world, folder)
    told(f"{family.name}: {len(contexts)} runs, reward {fmean(c.reward for c in contexts):.2f}")
    arena = Arena(world, env, bench.engine, bench.engine.tokenizer, greedy, CONTEXT_TOKENS, bench.model, NOTE_TOKENS)
    if {"admission", "sedm"} & set(bench.rows):
        await admission(bench, family, env, contexts, arena, folder)
        await use(bench, family, env, greedy, folder)
    await test(bench, family, env, contexts, greedy, folder)


async def experience(bench: Bench, family: Family, env: Environment, world: World, folder: Path) -> list[Context]:
    """Runs without notes, from the folder or made now."""
    path = folder / "experience.jsonl"
    if path.exists():
        return [from_json(line, Context) for line in path.read_bytes().splitlines()]
    drawn = [env.task("train", n, 1) for n in range(max(8, round(family.tasks * bench.scale)))]
    tasks = [task for task in drawn for _ in range(family.group)]
    params = SamplingParams(max_tokens=family.max_tokens, temperature=EXPLORE, seed=1)
    episodes = await bench.play(env, tasks, params)
    sampled = Sampled(params, CONTEXT_TOKENS, bench.model)
    contexts = [await context_of(e, env, world, sampled) for e in episodes if e.outcome == "done"]
    write_whole(path, b"".join(to_json(context) + b"\n" for context in contexts))
    return contexts


async def admission(
    bench: Bench, family: Family, env: Environment, contexts: Sequence[Context], arena: Arena, folder: Path
) -> None:
    """Try candidates of each template until one is admitted."""
    path = folder / "admission.json"
    if path.exists():
        return
    keeper = bench.keeper
    rows = []
    candidates = folder / "candidates.json"
    if not candidates.exists():
        write_whole(candidates, json.dumps(await proposed(bench, family, env, contexts)).encode())

    def in_time(count: int, decision: Decision) -> None:
        bench.check_time()

    for template, entries in json.loads(candidates.read_bytes()).items():
        for entry in entries[:CANDIDATES]:
            try:
                decision = await admit(keeper, arena, entry, parallel=AT_ONCE // 2, most=MOST_TRIALS, told=in_time)
            except ReplayVoid as error:
                told(f"{family.name}: {template} {error}")
                continue
            status = keeper.memory(entry).status
            rows.append({"template": template, "entry": entry, "status": status, "trials": decision.num_trials})
            told(f"{family.name}: {template} {decision.verdict} after {decision.num_trials}, {decision.mean:+.2f}")
            if status == "active":
                break
    write_whole(path, json.dumps(rows).encode())


async def proposed(bench: Bench, family: Family, env: Environment, contexts: Sequence[Context]) -> dict[str, list[str]]:
    """Candidates by template, the best runs' first; of a family that others' memories are carried over to, those."""
    keeper = bench.keeper
    found: dict[str, list[str]] = defaultdict(list)
    if family.origin:
        for memory in list(keeper.store.memories("active")):
            if memory.entry.family == family.origin and memory.entry.provenance.rule != "abstract":
                form = keeper.diffuse(memory.id, family.name)
                if form is not None:
                    found[template_of(form.entry.source_task)].append(form.id)
        return found
    best = sorted((c for c in contexts if c.reward >= 0.5), key=lambda c: -c.reward)
    for context in best:
        template = template_of(context.task.id)
        if len(found[template]) < CANDIDATES:
            found[template] += (await learn(keeper, [context], env=env)).added
    return found


def template_of(task: str) -> str:
    """What a task's siblings have in common."""
    return task.partition("/")[0].partition("-")[0]


async def use(bench: Bench, family: Family, env: Environment, params: SamplingParams, folder: Path) -> None:
    """Let use move the weights."""
    path = folder / "use.json"
    if path.exists():
        return
    tasks = [env.task("train", n, 2) for n in range(max(6, round(family.uses * bench.scale)))]
    recalls = [recalled(bench, family, env, task) for task in tasks]
    alone = await bench.play(env, tasks, params)
    shown = await bench.play(
        env, [noted(t, text, entries) for t, (text, entries) in zip(tasks, recalls, strict=True)], params
    )
    for (_, entries), before, after in zip(recalls, alone, shown, strict=True):
        if entries and before.outcome == after.outcome == "done":
            bench.keeper.used(entries, min(1.0, max(-1.0, after.reward - before.reward)))
    bench.keeper.maintain()
    write_whole(path, json.dumps({"uses": sum(len(entries) for _, entries in recalls)}).encode())


def recalled(bench: Bench, family: Family, env: Environment, task: Task) -> tuple[str, tuple[str, ...]]:
    block = bench.keeper.recall(
        asked_in(env, task),
        max_tokens=NOTE_TOKENS,
        count_tokens=bench.count,
        k=K,
        family=family.name,
        likeness=LIKENESS,
    )
    return block.text, block.entries


async def test(
    bench: Bench, family: Family, env: Environment, contexts: Sequence[Context], params: SamplingParams, folder: Path
) -> None:
    """One row after another on the same held-out tasks; each episode is kept as soon as its batch is over."""
    path = folder / "test.jsonl"
    done: set[tuple[str, str]] = set()
    if path.exists():
        done = {(row["row"], row["task"]) for row in map(json.loads, path.read_text().splitlines())}
    tasks = env.heldout(max(8, round(family.tests * bench.scale)))
    for name in bench.rows:
        missing = [task for task in tasks if (name, task.id) not in done]
        if not missing:
            continue
        remembers = rememberer(name, bench, family, env, contexts)
        if remembers is None:
            continue
        for start in range(0, len(missing), AT_ONCE):
            batch = missing[start : start + AT_ONCE]
            blocks = [remembers(asked_in(env, task)) for task in batch]
            shown = [noted(task, block) for task, block in zip(batch, blocks, strict=True)]
            episodes = await bench.play(env, shown, params)
            with path.open("a") as file:
                for task, block, episode in zip(batch, blocks, episodes, strict=True):
                    if episode.outcome != "done":
                        raise ReplayVoid(f"a test of {family.name} is void: {episode.void_reason}")
                    row = {
                        "row": name,
                        "task": task.id,
                        "reward": episode.reward,
                        "strict": episode.reward_parts.get("strict", episode.reward),
                        "prompt_tokens": sum(len(turn.context_ids) for turn in episode.turns),
                        "note_tokens": bench.count(block) if block else 0,
                        "reply": [turn.completion.text for turn in episode.turns],
                    }
                    file.write(json.dumps(row) + "\n")
        told(f"{family.name}: {name} tested on {len(missing)}")


def rememberer(
    name: str, bench: Bench, family: Family, env: Environment, contexts: Sequence[Context]
) -> Callable[[str], str] | None:
    """From a question to a block of notes; None where this way of remembering cannot be had here."""
    kept = [transcript(context) for context in contexts]

    def block(texts: Sequence[str], limit: int = NOTE_TOKENS) -> str:
        entries = [Entry(text=t, family=family.name, provenance=Provenance(rule="manual")) for t in texts]
        return compose(entries, max_tokens=limit, count_tokens=bench.count).text

    if name == "none":
        return lambda question: ""
    if name == "full":
        everything = block(kept[::-1][:64], FULL_TOKENS)
        return lambda question: everything
    if name == "newest":
        newest = block(kept[::-1][:K])
        return lambda question: newest
    if name == "vector":
        embedder = HashedEmbedder()
        vectors = embedder.embed(kept)

        def nearest(question: str) -> str:
            likeness = vectors @ embedder.embed([question])[0]
            best = np.argsort(-likeness, kind="stable")[:K]
            return block([kept[i] for i in best if likeness[i] >= LIKENESS])

        return nearest
    if name == "mem0":
        peer = Mem0.opened(kept)
        return None if peer is None else lambda question: block(peer.search(question, K))
    if name == "admission":

        def alike(question: str) -> str:
            found = bench.keeper.search(question, 16, family=family.name)
            found.sort(key=lambda one: -one.similarity)
            return block([one.memory.entry.text for one in found[:K] if one.similarity >= LIKENESS])

        return alike
    assert name == "sedm"
    return lambda question: (
        bench.keeper.recall(
            question, max_tokens=NOTE_TOKENS, count_tokens=bench.count, k=K, family=family.name, likeness=LIKENESS
        ).text
    )


def transcript(context: Context) -> str:
    """A run as memories without admission keep it."""
    acts = "\nthen ".join(context.actions)
    return f"Task: {asked(context)}\nReply: {acts}\nReward: {context.reward:g}"[:4000]


def told(words: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {words}", file=sys.stderr, flush=True)


def write_whole(path: Path, data: bytes) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_bytes(data)
    scratch.replace(path)


async def play_families(
    folder: Path,
    names: Sequence[str],
    *,
    model: str,
    tools_model: str,
    rows: Sequence[str],
    minutes: float,
    scale: float,
    dtype: str,
) -> None:
    """Play families, one after another, each with its model; what there is already is not played again."""
    ends = time.monotonic() + 60 * minutes
    with Keeper(folder / "memory", "bench") as keeper:
        for which in sorted({tools_model if FAMILIES[name].tools else model for name in names}):
            local = resolve(which, model_cache(), told)
            engine = await asyncio.to_thread(
                LocalEngine,
                local,
                dtype=dtype,
                device="auto",
                max_sequences=2 * AT_ONCE,
                context_tokens=CONTEXT_TOKENS,
                cache_tokens=32 * 1024,
                prefix_tokens=8 * 1024,
            )
            async with engine:
                bench = Bench(folder, keeper, engine, weights_hash(local.directory), ends, scale, rows)
                for name in names:
                    if which == (tools_model if FAMILIES[name].tools else model):
                        try:
                            await run_family(bench, FAMILIES[name])
                        except OutOfTime:
                            told(f"{name}: out of time; the same folder goes on")
                            return
