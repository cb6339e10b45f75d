"""An environment that constrains its turns: what is drawn matches, and the episode says what it had to match."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

# The checkpoints are those of the engine's tests: their tokenizer has every byte.
sys.path.append(str(Path(__file__).parents[1] / "engine"))

from engine_cases import make_checkpoint

from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.envs.base import Observation, Step
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Grammar, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from tiny import TwoTurns

FIRST, SECOND = Grammar(kind="regex", text="[0-9]{3}"), Grammar(kind="regex", text="(yes|no)")


class Bound(TwoTurns):
    """Wants three digits, then yes or no."""

    async def reset(self, task: Task) -> Observation:
        return Observation((await super().reset(task)).messages, FIRST)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        step = await super().step(action, truncated=truncated)
        return Step(step.observation, step.reward, step.done, step.info, SECOND)


class Misspelt(Bound):
    """Its author cannot write regular expressions."""

    async def reset(self, task: Task) -> Observation:
        return Observation((await super().reset(task)).messages, Grammar(kind="regex", text="(("))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("constrained") / "model")


async def run(directory: Path, env: Bound, seed: int) -> Episode:
    task = Task(env="digit", id="train-3", seed=0)
    spec = EpisodeSpec(id="e", group="g", index=0, task=task, params=SamplingParams(max_tokens=8, seed=seed))
    async with LocalEngine(
        LocalModel("tiny", directory), dtype="fp32", device="cpu", max_sequences=4, context_tokens=256
    ) as engine:
        return await run_episode(spec, engine, engine.tokenizer, env, context_tokens=256)


async def test_each_turn_matches_what_it_had_to(directory: Path) -> None:
    for seed in range(3):
        episode = await run(directory, Bound(name="digit"), seed)
        assert episode.outcome == "done" and episode.reward == 0.5
        first, second = episode.turns
        assert (first.grammar, second.grammar) == (FIRST, SECOND)
        assert re.fullmatch("[0-9]{3}", first.completion.text)
        assert second.completion.text in ("yes", "no")
        assert decode(encode(episode), Episode) == episode


async def test_a_grammar_that_is_none_makes_an_episode_void(directory: Path) -> None:
    episode = await run(directory, Misspelt(name="digit"), 0)
    assert episode.outcome == "void" and "grammar" in episode.void_reason
