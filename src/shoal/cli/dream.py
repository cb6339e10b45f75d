"""`shoal dream`: a world model of the web, from real episodes to its measure (docs/dreams.md); `collect` is here."""

from __future__ import annotations

import asyncio
import json as json_codec
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from shoal.cli import dream_eval, dream_fit, dream_show
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError, RunError, ShoalError

if TYPE_CHECKING:
    from shoal.coordinator.rundir import RunDir
    from shoal.envs.dream.collect import Actor, Collected
    from shoal.envs.web.environment import Web
    from shoal.protocol.episode import Task

app = App(name="dream", help="A world model of the web: collect what it learns from, fit it, measure it.")
app.command(dream_fit.fit)
app.command(dream_eval.bound)
app.command(dream_eval.evaluate, name="eval")
app.command(dream_show.show)

EPISODES, CONVERSATIONS, SETTINGS = "episodes.jsonl", "conversations.jsonl", "settings.json"
CONTEXT_TOKENS = 8192
MAX_SPOILT = 5
"""Episodes spoilt in a row after which collecting stops and says why."""


@app.command
def collect(
    *,
    out: Path,
    policy: Literal["reference", "random", "model"] = "reference",
    split: Literal["train", "heldout"] = "train",
    episodes: int = 100,
    seed: int = 0,
    at_once: int = 3,
    config: str = "web",
    model: str = "embedded",
    max_tokens: int = 64,
    temperature: float = 1.0,
    threads: int = 1,
    json: Json = False,
) -> None:
    """Play real tasks and keep every page and act; called again with the same folder, go on where it stopped.

    Writes FOLDER/episodes.jsonl (one line an episode) and FOLDER/conversations.jsonl (those that succeeded, as
    conversations for shoal sft).

    For example:

        shoal dream collect --out dreams/experts --policy reference --episodes 500
        shoal dream collect --out dreams/wandering --policy random --episodes 500
        shoal sft embedded dreams/experts/conversations.jsonl --out dreams/sft

    Args:
        out: The folder.
        policy: What acts: a task's reference policy, chance, or a model.
        split: Tasks to train on, or those that are held out.
        episodes: How many, those that are there already included.
        seed: Selects tasks, and what chance does.
        at_once: Browser tabs at work.
        config: The configuration whose web environment is played.
        model: With policy model: embedded, a directory, a .gguf file or a hub name.
        max_tokens: Longest act of the model.
        temperature: Of the model's sampling.
        threads: CPU threads of the model.
    """
    settings: dict[str, Any] = {"policy": policy, "split": split, "seed": seed, "config": config}
    if policy == "model":
        settings |= {"model": model, "temperature": temperature}
    found = asyncio.run(
        _collect(out, settings, episodes, at_once, model if policy == "model" else "", max_tokens, temperature, threads)
    )
    if json:
        print_json(found)
        return
    for name, value in found.items():
        console().print(f"{name:22} {value}", markup=False)


def _environment(config_name: str) -> Web:
    from shoal.config import load_config
    from shoal.coordinator.tasks import make_environments
    from shoal.envs.web.environment import Web

    made = make_environments(load_config(config_name, []))
    web = [env for env in made.values() if isinstance(env, Web)]
    if len(web) != 1:
        raise ConfigError(
            f"{config_name} has {len(web)} environments of type web, not one.", "Name another with --config."
        )
    return web[0]


async def _collect(
    out: Path,
    settings: dict[str, Any],
    episodes: int,
    at_once: int,
    model: str,
    max_tokens: int,
    temperature: float,
    threads: int,
) -> dict[str, Any]:
    from shoal.coordinator.rundir import RunDir
    from shoal.envs.dream.collect import Collected, play
    from shoal.envs.web.browser import close_browser
    from shoal.protocol.codec import read_jsonl

    env = _environment(settings["config"])
    folder = RunDir(out)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    try:
        _same_settings(folder, settings)
        folder.cut_half_line(EPISODES)
        path = folder.path / EPISODES
        done = {one.id for one in read_jsonl(path, Collected)} if path.exists() else set()
        todo = _tasks(env, settings, episodes, done)
        spoilt = spoilt_in_a_row = 0

        async def work(actor: Actor | None) -> None:
            nonlocal spoilt, spoilt_in_a_row
            for task, number in todo:
                try:
                    one = await play(env.fresh(), task, settings["split"], settings["policy"], number, actor)  # type: ignore[arg-type]
                except ShoalError as error:
                    spoilt, spoilt_in_a_row = spoilt + 1, spoilt_in_a_row + 1
                    note(f"{task.id}: {error}")
                    if spoilt_in_a_row >= MAX_SPOILT:
                        raise
                    continue
                spoilt_in_a_row = 0
                folder.append_record(EPISODES, one)

        async with _actor(model, max_tokens, temperature, threads) as actor:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(max(1, at_once)):
                        group.create_task(work(actor))
            except* ShoalError as errors:
                raise errors.exceptions[0] from None
            finally:
                await close_browser()
        return {"folder": str(folder.path), "spoilt": spoilt, **_summary(folder)}
    finally:
        folder.close()


def _same_settings(folder: RunDir, settings: dict[str, Any]) -> None:
    """Raises RunError where the folder holds something else."""
    path = folder.path / SETTINGS
    if path.exists() and json_codec.loads(path.read_bytes()) != settings:
        raise RunError(
            f"{folder.path} was collected with other settings: {path.read_text()[:200]}", "Name another --out."
        )
    folder.write_atomic(SETTINGS, json_codec.dumps(settings).encode())


def _tasks(env: Web, settings: dict[str, Any], episodes: int, done: set[str]) -> Iterator[tuple[Task, int]]:
    """What is still to be played: task and number."""
    for number in range(episodes):
        task = env.task(settings["split"], number, settings["seed"])
        if f"{task.id}/{settings['policy']}/{number}" not in done:
            yield task, number


@asynccontextmanager
async def _actor(model: str, max_tokens: int, temperature: float, threads: int) -> AsyncIterator[Actor | None]:
    """The model that acts, where one does."""
    if not model:
        yield None
        return
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.protocol.chat import Message
    from shoal.protocol.sampling import Grammar, SampleRequest, SamplingParams
    from shoal.rollout.host import model_cache

    source = await asyncio.to_thread(resolve, model, model_cache(), note)
    async with LocalEngine(source, threads=threads, context_tokens=CONTEXT_TOKENS) as engine:

        async def act(messages: list[Message], grammar: Grammar | None) -> str:
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
            prompt = tuple(engine.tokenizer.prompt(messages))
            reply = await engine.sample(SampleRequest(prompt_ids=prompt, params=params, grammar=grammar))
            return reply.text

        yield act


def _summary(folder: RunDir) -> dict[str, Any]:
    """Counts; and the conversations of episodes that succeeded, written anew."""
    from shoal.envs.dream.collect import Collected, transitions
    from shoal.protocol.codec import read_jsonl

    lines: list[bytes] = []
    count = moves = changed = 0
    path = folder.path / EPISODES
    records: Iterator[Collected] = read_jsonl(path, Collected) if path.exists() else iter(())
    for one in records:
        count += 1
        for move in transitions(one):
            moves += 1
            changed += move.before != move.after
        if one.reward == 1.0:
            lines.append(json_codec.dumps({"messages": one.messages}, ensure_ascii=False).encode())
    folder.write_atomic(CONVERSATIONS, b"".join(line + b"\n" for line in lines))
    return {"episodes": count, "succeeded": len(lines), "transitions": moves, "changed_the_page": changed}
