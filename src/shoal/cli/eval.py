"""`shoal eval`: measure a model on held-out questions of an environment, on quests (`evm`), or as an agent (`gaia`)."""

from __future__ import annotations

import asyncio
from typing import Any

from cyclopts import App

from shoal.cli import eval_evm, eval_gaia
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json

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
    from shoal.coordinator.reporting.paired import interval
    from shoal.coordinator.tasks import TaskSource, make_environments
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.envs.base import stable_int, strict_and_lenient
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.episode import EpisodeSpec, run_episode
    from shoal.rollout.host import model_cache

    config = load_config(config_name, ["--eval.questions", str(questions), "--eval.max_tokens", str(max_tokens)])
    environments = make_environments(config)
    tasks = TaskSource(config, environments).heldout()
    model = await asyncio.to_thread(resolve, name, model_cache(), note)
    gate = asyncio.Semaphore(QUESTIONS_AT_ONCE)
    context = config.model.context_tokens
    async with LocalEngine(
        model, dtype=config.model.dtype, device=device, threads=threads, context_tokens=context
    ) as engine:

        async def answer(index: int) -> Any:
            task = tasks[index]
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                stop=config.rollout.stop,
                seed=stable_int("eval", seed, index),
            )
            spec = EpisodeSpec(id=f"eval/{index}", group="eval", index=index, task=task, params=params)
            async with gate:
                env = environments[task.env].fresh()
                return await run_episode(spec, engine, engine.tokenizer, env, context_tokens=context)

        episodes = await asyncio.gather(*(answer(i) for i in range(len(tasks))))
    done = [e for e in episodes if e.outcome == "done"]
    marks = [strict_and_lenient(e.reward, e.reward_parts) for e in done]
    count = max(1, len(done))
    strict = sum(s for s, _ in marks) / count
    return {
        "model": name,
        "questions": len(done),
        "void": len(episodes) - len(done),
        "accuracy": strict,
        "accuracy_lenient": sum(x for _, x in marks) / count,
        "interval": list(interval(strict, count)),
        "response_tokens_mean": sum(e.num_tokens for e in done) / count,
    }
