"""A loop's own process that answers the held-out questions of its environments, a line each, and ends.

Afterwards, where memory has something for a question, it is asked a second time with those notes. What is in the file
already is not asked again.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import RunError

if TYPE_CHECKING:
    from shoal.config import Config
    from shoal.envs.base import Environment
    from shoal.protocol.episode import Task

MAX_ATTEMPTS = 2
"""A question that infrastructure spoilt is asked once more, then left out on both sides."""


def run(run: Path, when: str, model: str, /) -> None:
    """Answer the held-out questions of a loop.

    Args:
        run: The run's folder.
        when: before or after.
        model: What answers.
    """
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    if when not in ("before", "after"):
        raise RunError(f"there is no measurement {when!r}.")
    asyncio.run(_measure(run, when, model))


async def _measure(run: Path, when: str, name: str) -> None:
    import json

    from shoal.cli.eval import QUESTIONS_AT_ONCE, answered
    from shoal.cli.loop_state import FOLDER, lines_of
    from shoal.config import load_config
    from shoal.coordinator.rundir import RunDir
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.envs.base import strict_and_lenient
    from shoal.rollout.host import model_cache

    config = load_config(str(run / "config.toml"))
    files, file = RunDir(run / FOLDER), f"{when}.jsonl"
    known = {(line["family"], line["task"], line["notes"]) for line in lines_of(files.path / file)}
    model = await asyncio.to_thread(resolve, name, model_cache())
    engine = await asyncio.to_thread(
        LocalEngine,
        model,
        dtype=config.model.dtype,
        device=config.workers.device,
        threads=config.workers.threads,
        max_sequences=config.workers.max_sequences,
        cache_tokens=config.workers.cache_tokens,
        context_tokens=config.model.context_tokens,
        prefix_tokens=config.workers.prefix_tokens,
    )
    gate = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    async def ask(env: Environment, task: Task, index: int, notes: bool) -> None:
        async with gate:
            for _ in range(MAX_ATTEMPTS):
                episode = await answered(engine, env, task, index, config)
                if episode.outcome == "done":
                    break
        strict, lenient = strict_and_lenient(episode.reward, episode.reward_parts)
        line: dict[str, Any] = {"family": env.name, "task": task.id, "notes": notes, "void": episode.outcome != "done"}
        line |= {"strict": strict, "lenient": lenient, "reward": episode.reward, "tokens": episode.num_tokens}
        line["answer"] = episode.turns[-1].completion.text[:500] if episode.turns else ""
        files.append(file, json.dumps(line, ensure_ascii=False).encode())

    async with engine:
        asked = [
            ask(env, task, index, notes)
            for env, tasks, notes in questions(config, with_notes=when == "after")
            for index, task in enumerate(tasks)
            if (env.name, task.id, notes) not in known
        ]
        await asyncio.gather(*asked)
    files.close()


def questions(config: Config, *, with_notes: bool) -> list[tuple[Environment, list[Task], bool]]:
    """Environment, held-out tasks, and whether they carry notes: all without, then those that memory knows something
    for."""
    from shoal.cli.loop_collective import STEPS_TYPE
    from shoal.config.root import RECALLING
    from shoal.envs.registry import make
    from shoal.memory.recalling import entries_of

    found: list[tuple[Environment, list[Task], bool]] = []
    recalled: list[tuple[Environment, list[Task], bool]] = []
    for name, env in config.envs.items():
        if env.type == STEPS_TYPE:
            continue  # Collected while training: nothing of it is held out.
        plain = make(env.type, env.settings, name=name)
        found.append((plain, plain.heldout(config.loop.questions), False))
        kind, settings = config.worlds[name]
        if with_notes and kind == RECALLING and config.loop.notes:
            noting = make(kind, {**settings, "share": 1.0}, name=name)
            noted = [task for task in noting.heldout(config.loop.notes) if entries_of(task)]
            recalled.append((noting, noted, True))
    return found + recalled
