"""`shoal memory replay|learn|join`: what takes a model or a network: trials, candidates of a run, a part in a swarm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.memory_store import SHORT_ID_CHARS, found_by, opened
from shoal.cli.output import note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config import Config
    from shoal.memory.admission import Decision
    from shoal.memory.keeper import Keeper
    from shoal.memory.state import Memory
    from shoal.memory.trials import Arena


@dataclass(frozen=True)
class Manner:
    """How trials are sampled here."""

    model: str
    """Empty: the configuration's."""
    temperature: float
    threads: int
    device: str


def replay(
    entry: str = "",
    /,
    *,
    config: str = "arithmetic",
    model: str = "",
    temperature: float = 0.0,
    most: int = 500,
    parallel: int = 8,
    threads: int = 1,
    device: str = "auto",
    folder: Path | None = None,
    json: Json = False,
) -> int:
    """Run trials: of candidates until they are decided, of an admitted memory to see whether its own end as it says.

    Without an entry all candidates about the configuration's environments are tried. Trials that are known are not run
    again, so what was interrupted goes on. The exit code is 1 if a kept trial ends otherwise.

    For example:

        shoal memory replay --config configs/tools.toml --model runs/NAME/model
        shoal memory replay 3f9c2a --most 20

    Args:
        entry: The beginning of a memory's id.
        config: The configuration whose environments the memories are about.
        model: embedded, a directory or a hub name; by default the configuration's.
        temperature: 0 is greedy.
        most: Trials of each memory, at most.
        parallel: Trials at once.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    if most < 1 or parallel < 1:
        raise ConfigError("--most and --parallel are 1 or more.")
    manner = Manner(model, temperature, threads, device)
    with opened(folder, must_exist=True) as keeper:
        memories = [found_by(keeper, entry)] if entry else list(keeper.store.memories("candidate"))
        rows = asyncio.run(_replay(keeper, memories, config, manner, most, parallel))
        for found in rows:
            found["status"] = keeper.memory(found["id"]).status
    different = sum(found.get("different", 0) for found in rows)
    if json:
        print_json({"memories": rows, "different": different})
    else:
        for found in rows:
            words = ", ".join(f"{name} {value}" for name, value in found.items() if name != "id")
            note(f"{found['id'][:SHORT_ID_CHARS]}  {words}")
        note(f"{len(rows)} memories tried.")
    return 1 if different else 0


async def _replay(
    keeper: Keeper, memories: list[Memory], config_name: str, manner: Manner, most: int, parallel: int
) -> list[dict[str, Any]]:
    from shoal.config import load_config
    from shoal.memory.trials import admit

    rows: list[dict[str, Any]] = []
    async with arenas_of(load_config(config_name), manner) as arenas:
        for memory in memories:
            arena = arenas.get(memory.entry.family)
            if arena is None:
                if len(memories) == 1:
                    raise ConfigError(
                        f"the memory is about {memory.entry.family!r}, and the configuration has no such environment.",
                        "Name its configuration by --config.",
                    )
                continue
            if memory.status == "candidate":

                def told(count: int, decision: Decision, name: str = memory.id) -> None:
                    note(f"{name[:SHORT_ID_CHARS]}  {decision.num_trials} trials, mean gain {decision.mean:+.3f}")

                decision = await admit(keeper, arena, memory.id, parallel=parallel, most=most, told=told)
                found = {"verdict": decision.verdict, "reason": decision.reason, "gain": decision.mean}
                rows.append({"id": memory.id, "trials": decision.num_trials, **found})
            else:
                rows.append({"id": memory.id, **await _again(keeper, arena, memory, most, parallel)})
    return rows


async def _again(keeper: Keeper, arena: Arena, memory: Memory, most: int, parallel: int) -> dict[str, Any]:
    """Kept trials run once more: how many were of these weights and settings, and how many ended otherwise."""
    kept = list(keeper.store.trials(memory).values())
    same = [trial for trial in kept if (trial.model, trial.config) == (arena.model, arena.config)][:most]
    different = 0
    for start in range(0, len(same), parallel):
        batch = same[start : start + parallel]
        again = await asyncio.gather(*(arena.rerun(memory.entry, trial) for trial in batch))
        different += sum(one != trial for one, trial in zip(again, batch, strict=True))
    return {"trials": len(kept), "rerun": len(same), "different": different}


@asynccontextmanager
async def arenas_of(config: Config, manner: Manner) -> AsyncIterator[dict[str, Arena]]:
    """Where trials of a configuration's environments are run: its engine, in fp32, so that greedy runs repeat."""
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.envs.registry import make
    from shoal.memory.records import World
    from shoal.memory.replay import weights_hash
    from shoal.memory.trials import Arena
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.host import model_cache

    local = await asyncio.to_thread(resolve, manner.model or config.model.name, model_cache(), note)
    weights = await asyncio.to_thread(weights_hash, local.directory)
    context_tokens = config.model.context_tokens
    params = SamplingParams(
        max_tokens=config.rollout.max_tokens, temperature=manner.temperature, stop=config.rollout.stop
    )
    engine = await asyncio.to_thread(
        LocalEngine,
        local,
        dtype="fp32",
        device=manner.device,
        threads=manner.threads,
        max_sequences=config.workers.max_sequences,
        cache_tokens=config.workers.cache_tokens,
        context_tokens=context_tokens,
    )
    async with engine:
        found = {}
        for name, env in config.envs.items():
            world = World(kind=env.type, settings=env.settings)
            made = make(env.type, env.settings, name=name)
            found[name] = Arena(
                world, made, engine, engine.tokenizer, params, context_tokens, weights, config.memory.max_tokens
            )
        yield found


def learn(
    run: Path,
    /,
    *,
    insight: str = "",
    most: int = 64,
    since: int = 0,
    until: int | None = None,
    threads: int = 1,
    device: str = "auto",
    folder: Path | None = None,
    json: Json = False,
) -> None:
    """Propose candidates from a run's episodes, and report what the notes that it was shown were worth.

    For example:

        shoal memory learn runs/NAME
        shoal memory learn runs/NAME --insight embedded

    Args:
        run: A run's folder, with its episodes.
        insight: A model that also writes what it makes of two attempts at one task.
        most: New candidates, at most, shared between the environments that are given notes.
        since: Only what was trained on from this step on: each use is to be reported once.
        until: Only what was trained on before this step.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    if not (run / "config.toml").exists() or not any((run / "episodes").glob("*.jsonl")):
        raise ConfigError(f"{run} is no run with episodes.", "Name a run's folder; output.keep_episodes keeps them.")
    with opened(folder) as keeper:
        result = asyncio.run(_learn(keeper, run, insight, most, (since, until), threads, device))
    if json:
        print_json(result)
    else:
        refused = ", ".join(f"{why} {count}" for why, count in result["refused"].items()) or "none"
        note(f"{len(result['added'])} candidates from {result['episodes']} episodes; refused: {refused}")
        note(f"{result['uses']} uses reported")


async def _learn(
    keeper: Keeper, run: Path, insight: str, most: int, steps: tuple[int, int | None], threads: int, device: str
) -> dict[str, Any]:
    from shoal.config import load_config
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.envs.registry import make
    from shoal.memory.learning import Learnt, SamplerInsight, learn, report_uses
    from shoal.memory.records import World
    from shoal.memory.replay import Sampled, context_of
    from shoal.protocol.codec import read_jsonl
    from shoal.protocol.episode import Episode
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.host import model_cache

    config = load_config(str(run / "config.toml"))
    since, until = steps
    numbered = {int(file.stem): file for file in sorted((run / "episodes").glob("*.jsonl"))}
    files = [file for step, file in numbered.items() if since <= step and (until is None or step < until)]
    episodes = [one for file in files for one in read_jsonl(file, Episode) if one.outcome == "done"]
    total = Learnt()
    async with AsyncExitStack() as stack:
        writer = None
        if insight:
            local = await asyncio.to_thread(resolve, insight, model_cache(), note)
            engine = await asyncio.to_thread(
                LocalEngine, local, device=device, threads=threads, context_tokens=config.model.context_tokens
            )
            await stack.enter_async_context(engine)
            writer = SamplerInsight(engine, engine.tokenizer)
        noted = {name: given for name, given in config.envs.items() if given.recall}
        for position, (name, given) in enumerate(noted.items()):
            share = -(-(most - len(total.added)) // (len(noted) - position))
            env = make(given.type, given.settings, name=name)
            world = World(kind=given.type, settings=given.settings)
            contexts = []
            for one in episodes:
                if one.task.env == name:
                    params = SamplingParams(max_tokens=config.rollout.max_tokens, temperature=one.temperature)
                    sampled = Sampled(params, config.model.context_tokens, config.model.name)
                    contexts.append(await context_of(one, env, world, sampled))
            learnt = await learn(keeper, contexts, env=env, insight=writer, most=share)
            total.added += learnt.added
            total.refused += learnt.refused
    uses = report_uses(keeper, episodes)
    return {"episodes": len(episodes), "added": total.added, "refused": dict(total.refused), "uses": uses}


def join(
    ticket: str,
    /,
    *,
    config: str = "",
    model: str = "",
    temperature: float = 0.0,
    name: str = "memory",
    threads: int = 1,
    device: str = "auto",
    folder: Path | None = None,
) -> None:
    """Share memories with a run's other nodes, have candidates tried by them, and run trials for them.

    Others' memories are used here once this machine has replayed them. Without a configuration it only shares.

    For example:

        shoal memory join shoal1lQG6Y2... --config configs/tools.toml

    Args:
        ticket: Of the run, for nodes in the role agent, or a file that holds it.
        config: The configuration whose environments this machine can run trials in.
        model: embedded, a directory or a hub name; by default the configuration's.
        temperature: 0 is greedy.
        name: What this node is called, for people.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        folder: Where the memories are; by default memory/ in Shoal's data directory.
    """
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    manner = Manner(model, temperature, threads, device)
    with opened(folder, vouched_only=True) as keeper:
        asyncio.run(_join(keeper, ticket, config, manner, name))


async def _join(keeper: Keeper, ticket_text: str, config_name: str, manner: Manner, name: str) -> None:
    import signal

    from shoal.cli.worker import read_ticket
    from shoal.config import load_config
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.identity import Identity, data_dir
    from shoal.fabric.ticket import Ticket
    from shoal.memory.node import MemoryNode
    from shoal.rollout.link import taking_part

    ticket = Ticket.decode(read_ticket(ticket_text))
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with AsyncExitStack() as stack:
        arenas = await stack.enter_async_context(arenas_of(load_config(config_name), manner)) if config_name else {}
        identity = Identity.load_or_create(data_dir())
        fabric = await stack.enter_async_context(await Fabric.connect(identity, ticket))
        part = await stack.enter_async_context(taking_part(fabric, ticket, "agent", name))
        node = await stack.enter_async_context(MemoryNode(part.member, keeper, arenas))
        note(f"{identity.node_id} shares {keeper.store.held()[0]} memories; trials of: {', '.join(arenas) or 'none'}")
        await ended.wait()
        note(f"{node.replayer.num_run if node.replayer is not None else 0} trials run for others and itself")
        keeper.retrieval.save()
