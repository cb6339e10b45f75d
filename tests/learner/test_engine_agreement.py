"""The engine that samples and the learner that trains compute the same log-probabilities, whatever the version."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from learner_cases import episode

from shoal.config.learner import AsyncLearner
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.learner.loading import load_policy
from shoal.learner.trainer import Trainer
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import SampleRequest, SamplingParams
from tiny import make_tiny_model

TEMPERATURE = 0.8
GROUP = 8


async def sampled(engine: LocalEngine, seed: int) -> list[Episode]:
    """Three groups of two-turn episodes, drawn concurrently, each group with mixed rewards."""

    async def act(group: int, index: int) -> Episode:
        turns: list[Turn] = []
        history: tuple[int, ...] = ()
        for turn in range(2):
            context = tuple(range(4 + group, 20 + 3 * group)) if turn == 0 else (5, 6, 7)
            history += context
            params = SamplingParams(max_tokens=12, temperature=TEMPERATURE, seed=seed + 100 * group + 10 * index + turn)
            drawn = await engine.sample(SampleRequest(prompt_ids=history, params=params))
            history += drawn.token_ids
            turns.append(Turn(context_ids=context, observation="", completion=drawn))
        return episode(f"g{group}", index, turns, float(index % 2), temperature=TEMPERATURE)

    return list(await asyncio.gather(*(act(group, index) for group in range(3) for index in range(GROUP))))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.15)])
async def test_without_an_update_between_every_ratio_is_one(
    dtype: Literal["fp32", "bf16"], tolerance: float, tmp_path: Path
) -> None:
    directory = make_tiny_model(tmp_path / "model")
    trainer = Trainer(
        load_policy(LocalModel("tiny", directory), dtype, "cpu"), AsyncLearner(lr=0.02, microbatch_tokens=300)
    )
    async with LocalEngine(
        LocalModel("tiny", directory), dtype=dtype, device="cpu", max_sequences=32, cache_tokens=4096
    ) as engine:
        for seed in (0, 1000, 2000):
            await engine.load_weights(trainer.version, to_views(trainer.tensors()))
            fresh = await sampled(engine, seed)
            assert {e.version for e in fresh} == {trainer.version}
            metrics = trainer.step(fresh)
            assert metrics["applied"] == 1
            assert metrics["ratio_max"] == pytest.approx(1, abs=tolerance)
            assert metrics["ratio_min"] == pytest.approx(1, abs=tolerance)
            assert metrics["ratio_mean"] == pytest.approx(1, abs=tolerance / 10)
            assert metrics["staleness_max"] == 0
        stale = trainer.step(await sampled(engine, seed=3000))
        assert stale["ratio_max"] > 1 + 2 * tolerance
        assert stale["staleness_max"] == 1
