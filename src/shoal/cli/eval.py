"""`shoal eval`: measure a model on held-out questions of an environment, on quests (`evm`), or as an agent (`gaia`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import App

from shoal.cli import eval_evm, eval_gaia
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json

if TYPE_CHECKING:
    from shoal.config import Config
    from shoal.engine.local import LocalEngine
    from shoal.envs.base import Environment
    from shoal.protocol.episode import Episode, Task

QUESTIONS_AT_ONCE = 256
"""Episodes in flight; the engine batches as many as its slots take."""


app = App(name="eval")
app.command(eval_evm.run, name="evm")
app.command(eval_gaia.run, name="gaia")


@app.default
def run(
    model: str = "embedded",
    /,
    *,
    config: str = "arithmetic",
    questions: int = 200,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> None:
    """Measure a model on held-out questions.

    For example:

        shoal eval runs/NAME/model
        shoal eval embedded --config configs/gsm8k.toml --questions 100 --json

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        config: The configuration whose environments ask.
        questions: Distinct held-out questions, over all environments.
        max_tokens: Longest answer of one turn.
        temperature: 0 is greedy.
        seed: Of the sampling, where temperature is above 0.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
    """
    result = asyncio.run(_evaluate(model, config, questions, max_tokens, temperature, seed, threads, device))
    if json:
        print_json(result)
        return
    out = console()
    low, high = result["interval"]
    out.print(
        f"{result['accuracy']:.1%} of {result['questions']} right (95 % interval {low:.1%} to {high:.1%}), "
        f"{result['accuracy_lenient']:.1%} leniently; {result['void']} void; "
        f"{result['response_tokens_mean']:.0f} tokens an answer",
        markup=False,
    )


async def _evaluate(
    name: str,
    config_name: str,
    questions: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    from shoal.config import load_config
    from shoal.coordinator.tasks import make_environments
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    config = load_config(config_name, ["--eval.questions", str(questions), "--eval.max_tokens", str(max_tokens)])
    environments = make_environments(config)
    model = await asyncio.to_thread(resolve, name, model_cache(), note)
    context = config.model.context_tokens
    async with LocalEngine(
        model, dtype=config.model.dtype, device=device, threads=threads, context_tokens=context
    ) as engine:
        episodes = await all_answered(engine, config, environments, temperature=temperature, seed=seed)
    return {"model": name, **accuracy_of(episodes)}


async def all_answered(
    engine: LocalEngine,
    config: Config,
    environments: Mapping[str, Environment],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Episode]:
    """Every held-out task of a configuration, acted on once."""
    from shoal.coordinator.tasks import TaskSource

    gate = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    async def answer(index: int, task: Task) -> Episode:
        async with gate:
            env = environments[task.env]
            return await answered(engine, env, task, index, config, temperature=temperature, seed=seed)

    tasks = TaskSource(config, environments).heldout()
    return list(await asyncio.gather(*(answer(index, task) for index, task in enumerate(tasks))))


def accuracy_of(episodes: Sequence[Episode]) -> dict[str, Any]:
    """What held-out episodes show; those that infrastructure spoilt are only counted."""
    from shoal.coordinator.reporting.paired import interval
    from shoal.envs.base import strict_and_lenient

    done = [e for e in episodes if e.outcome == "done"]
    marks = [strict_and_lenient(e.reward, e.reward_parts) for e in done]
    count = max(1, len(done))
    strict = sum(s for s, _ in marks) / count
    return {
        "questions": len(done),
        "void": len(episodes) - len(done),
        "accuracy": strict,
        "accuracy_lenient": sum(x for _, x in marks) / count,
        "interval": list(interval(strict, count)),
        "response_tokens_mean": sum(e.num_tokens for e in done) / count,
    }


async def answered(
    engine: LocalEngine,
    env: Environment,
    task: Task,
    index: int,
    config: Config,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Episode:
    """One held-out task, acted on with the lengths that a configuration says."""
    from shoal.envs.base import stable_int
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.episode import EpisodeSpec, run_episode

    params = SamplingParams(
        max_tokens=config.eval.max_tokens,
        temperature=temperature,
        stop=config.rollout.stop,
        seed=stable_int("eval", seed, index),
    )
    spec = EpisodeSpec(id=f"eval/{index}", group="eval", index=index, task=task, params=params)
    return await run_episode(spec, engine, engine.tokenizer, env.fresh(), context_tokens=config.model.context_tokens)
