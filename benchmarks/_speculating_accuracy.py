"""What the acceptance rules do to a task's accuracy: the same held-out questions under each, greedily, pair by pair."""

from __future__ import annotations

import asyncio
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from _speculating import Z_95, say
from shoal.config import load_config
from shoal.config.speculation import MarginRule, SemanticRule
from shoal.coordinator.tasks import TaskSource, make_environments
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel, resolve
from shoal.engine.speculation import profile
from shoal.engine.speculation.drafters import Drafters
from shoal.engine.speculation.drafting import Drafting, Fixed
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.speculating import Speculation
from shoal.engine.speculation.strict import Strict
from shoal.envs.base import strict_and_lenient
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.host import model_cache
from shoal.serving.speculation import rule_of

GAMMA = 5
AT_ONCE = 16
MAX_TOKENS = 32


async def accuracy(
    model: LocalModel, draft: Path, config_name: str, items: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Accuracy under strict, margin and semantic, and what the lossy ones lose."""
    config = load_config(config_name, ["--eval.questions", str(items), "--eval.max_tokens", str(MAX_TOKENS)])
    environments = make_environments(config)
    tasks = TaskSource(config, environments).heldout()
    known = profile.load(model.directory)
    drafters = Drafters(resolve(str(draft), model_cache(), say), model, torch.bfloat16, torch.device("cpu"))
    rules: dict[str, Rule] = {"strict": Strict(), "margin": rule_of(MarginRule(), known)}
    rules["semantic"] = rule_of(SemanticRule(), known)
    context = config.model.context_tokens
    marks: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    gate = asyncio.Semaphore(AT_ONCE)
    for name, rule in rules.items():
        speculation = Speculation(Drafting(drafters.make(AT_ONCE, AT_ONCE * context), Fixed(GAMMA)), rule)
        async with LocalEngine(
            model, threads=1, max_sequences=AT_ONCE, cache_tokens=AT_ONCE * context, context_tokens=context,
            speculation=speculation,
        ) as engine:  # fmt: skip

            async def answer(index: int, name: str = name, engine: LocalEngine = engine) -> float:
                task = tasks[index]
                params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop=config.rollout.stop)
                spec = EpisodeSpec(id=f"{name}/{index}", group="bench", index=index, task=task, params=params)
                async with gate:
                    env = environments[task.env].fresh()
                    episode = await run_episode(spec, engine, engine.tokenizer, env, context_tokens=context)
                if index % 50 == 0:
                    say(f"accuracy {name}: question {index}")
                return float(strict_and_lenient(episode.reward, episode.reward_parts)[0])

            marks[name] = list(await asyncio.gather(*map(answer, range(len(tasks)))))
        row = {"part": "accuracy", "rule": repr(rule), "items": len(tasks), "accuracy": statistics.fmean(marks[name])}
        row["accepted_share"] = speculation.accepted / max(1, speculation.drafted)
        rows.append(row)
    headline = {"accuracy_strict": statistics.fmean(marks["strict"])}
    for name in ("margin", "semantic"):
        lost = [a - b for a, b in zip(marks["strict"], marks[name], strict=True)]
        headline[f"{name}_accuracy_loss"] = statistics.fmean(lost)
        error = statistics.stdev(lost) / math.sqrt(len(lost))
        headline[f"{name}_accuracy_loss_bound"] = headline[f"{name}_accuracy_loss"] + Z_95 * error
    return rows, headline
