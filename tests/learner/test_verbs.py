"""Four verbs are enough to learn: a loop of twenty lines, and the model that it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import ColocatedLearner
from shoal.learner.verbs import Tuner, episode
from shoal.protocol.chat import Message
from shoal.protocol.sampling import SampleRequest, SamplingParams
from tiny import make_tiny_model


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_loop_of_ones_own_learns(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    settings = ColocatedLearner(lr=0.03, device="cpu")
    small = {"max_sequences": 32, "cache_tokens": 2048, "context_tokens": 64}
    rewards = []
    async with Tuner(str(model), settings, dtype="fp32", **small) as tuner:
        prompts = [tuner.prompt([Message(role="user", content=f"{n}?")]) for n in range(4)]
        for step in range(12):
            requests = [
                SampleRequest(prompt_ids=prompt, params=SamplingParams(max_tokens=2, seed=1000 * step + n))
                for prompt in prompts
                for n in range(8)
            ]
            completions = await tuner.sample(requests)
            assert {version for completion in completions for version in completion.versions} == {step}
            earned = [float(completion.text[:1].isdigit()) for completion in completions]
            groups = [f"g{step}.{n // 8}" for n in range(32)]
            made = map(episode, groups, range(32), requests, completions, earned)
            found = tuner.forward_backward(list(made))
            assert found.stats.tokens == 0 or abs(found.stats.ratio_max - 1) < 1e-3
            await tuner.optim_step()
            rewards.append(sum(earned) / 32)
        assert tuner.version == 12
        tuner.save(tmp_path / "saved")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
    async with Tuner(str(tmp_path / "saved"), settings, dtype="fp32", **small) as again:
        answers = await again.sample(
            [SampleRequest(prompt_ids=p, params=SamplingParams(max_tokens=2, temperature=0.0)) for p in prompts]
        )
        assert sum(answer.text[:1].isdigit() for answer in answers) >= 3
