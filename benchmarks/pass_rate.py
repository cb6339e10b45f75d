"""How often the untuned model is right, and how many groups can teach anything, by sampling temperature.

A group of rollouts whose rewards are all equal has no advantage. Rows: temperature -> share of right answers (strict),
share of groups with both right and wrong answers, mean length. The model and the questions are the demo's.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from shoal.config import load_config
from shoal.coordinator.tasks import TaskSource, make_environments
from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.host import model_cache

from _common import benchmark, emit

TEMPERATURES = (1.0, 0.7, 0.5)
GROUPS = 48


async def measure() -> list[dict[str, Any]]:
    config = load_config("arithmetic", [])
    environments = make_environments(config)
    source = TaskSource(config, environments)
    model = resolve(config.model.name, model_cache())
    size, context = config.rollout.group_size, config.model.context_tokens
    rows = []
    async with LocalEngine(model, context_tokens=context) as engine:
        for temperature in TEMPERATURES:

            def episode(group: int, index: int, temperature: float = temperature) -> Any:
                params = SamplingParams(
                    max_tokens=config.rollout.max_tokens,
                    temperature=temperature,
                    seed=source.seeds(group, size)[index],
                )
                task = source.group(group)
                spec = EpisodeSpec(id=f"{group}/{index}", group=str(group), index=index, task=task, params=params)
                env = environments[task.env].fresh()
                return run_episode(spec, engine, engine.tokenizer, env, context_tokens=context)

            episodes = await asyncio.gather(*(episode(g, i) for g in range(GROUPS) for i in range(size)))
            rewards = [[e.reward for e in episodes[g * size : (g + 1) * size]] for g in range(GROUPS)]
            rows.append(
                {
                    "temperature": temperature,
                    "pass_rate": sum(map(sum, rewards)) / len(episodes),
                    "mixed_groups": sum(len(set(group)) > 1 for group in rewards) / GROUPS,
                    "tokens_mean": sum(e.num_tokens for e in episodes) / len(episodes),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    rows = asyncio.run(measure())
    headline = {f"mixed_groups_at_{row['temperature']}": row["mixed_groups"] for row in rows}
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
