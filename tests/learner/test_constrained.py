"""Episodes whose completions had to match a grammar: the learner's distribution is the masked one, as the engine's."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from learner_cases import episode
from msgspec.structs import replace

# The checkpoints are those of the engine's tests: their tokenizer has every byte.
sys.path.append(str(Path(__file__).parents[1] / "engine"))

from engine_cases import IM_START, make_checkpoint

from shoal.config.learner import AsyncLearner
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import to_views
from shoal.errors import RunError
from shoal.learner.head import chosen_logprobs
from shoal.learner.loading import load_policy
from shoal.learner.trainer import Trainer
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Grammar, SampleRequest, SamplingParams

TEMPERATURE = 0.8
GRAMMARS = (
    Grammar(kind="regex", text="[ab]{2}(then|[0-9]+)c{0,3}"),
    Grammar(kind="lark", text='start: "{\\"n\\": " N "}"\nN: /[0-9]{1,9}/'),
    Grammar(kind="json_schema", text='{"enum": ["owing", "the", "ling"]}'),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("constrained") / "model")


async def sampled(engine: LocalEngine, seed: int) -> list[Episode]:
    """Groups of two-turn episodes, the first turn of each constrained, the second free."""

    async def act(group: int, index: int) -> Episode:
        turns: list[Turn] = []
        history: tuple[int, ...] = ()
        for turn, grammar in enumerate((GRAMMARS[group], None)):
            context = (IM_START, *range(40, 50 + 3 * group)) if turn == 0 else (50, 60, 70)
            history += context
            params = SamplingParams(max_tokens=12, temperature=TEMPERATURE, seed=seed + 100 * group + 10 * index + turn)
            drawn = await engine.sample(SampleRequest(prompt_ids=history, params=params, grammar=grammar))
            history += drawn.token_ids
            turns.append(Turn(context_ids=context, observation="", completion=drawn, grammar=grammar))
        return episode(f"g{group}", index, turns, float(index % 2), temperature=TEMPERATURE)

    return list(await asyncio.gather(*(act(group, index) for group in range(len(GRAMMARS)) for index in range(6))))


def trainer_of(directory: Path, dtype: Literal["fp32", "bf16"] = "fp32", *, tokenizer: bool = True) -> Trainer:
    model = load_policy(LocalModel("tiny", directory), dtype, "cpu")
    settings = AsyncLearner(lr=0.01, microbatch_tokens=200)
    return Trainer(model, settings, tokenizer=Tokenizer(directory) if tokenizer else None)


def engine_of(directory: Path, dtype: str = "fp32") -> LocalEngine:
    return LocalEngine(
        LocalModel("tiny", directory),
        dtype=dtype,
        device="cpu",
        max_sequences=32,
        cache_tokens=4096,
        context_tokens=128,
    )


def without_grammars(episodes: list[Episode]) -> list[Episode]:
    return [replace(e, turns=tuple(replace(turn, grammar=None) for turn in e.turns)) for e in episodes]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.15)])
async def test_without_an_update_between_every_ratio_is_one(
    dtype: Literal["fp32", "bf16"], tolerance: float, directory: Path
) -> None:
    trainer = trainer_of(directory, dtype)
    async with engine_of(directory, dtype) as engine:
        for seed in (0, 1000):
            await engine.load_weights(trainer.version, to_views(trainer.tensors()))
            fresh = await sampled(engine, seed)
            assert all(e.turns[0].completion.finish in ("stop", "length") for e in fresh)
            metrics = trainer.step(fresh)
            assert metrics["applied"] == 1 and metrics["episodes_refused"] == 0
            assert metrics["ratio_max"] == pytest.approx(1, abs=tolerance)
            assert metrics["ratio_min"] == pytest.approx(1, abs=tolerance)
            assert metrics["mismatch_kl"] == pytest.approx(0, abs=tolerance)
        await engine.load_weights(trainer.version, to_views(trainer.tensors()))
        blind = trainer.step(without_grammars(await sampled(engine, seed=2000)))
        assert blind["ratio_min"] < 0.5, "what the masks are for"


async def test_a_completion_that_its_grammar_forbids_is_refused(directory: Path) -> None:
    trainer = trainer_of(directory)
    async with engine_of(directory) as engine:
        honest = await sampled(engine, seed=0)
    first = honest[0].turns[0]
    forged = replace(first.completion, token_ids=(*first.completion.token_ids[:-1], 200))
    broken = Grammar(kind="regex", text="((")
    for turn in (replace(first, completion=forged), replace(first, grammar=broken)):
        liar = replace(honest[0], turns=(turn, honest[0].turns[1]))
        metrics = trainer.step([liar, *honest[1:]])
        assert metrics["episodes_refused"] == 1 and metrics["nonfinite"] == 0


async def test_a_learner_without_a_tokenizer_says_so(directory: Path) -> None:
    async with engine_of(directory) as engine:
        episodes = await sampled(engine, seed=0)
    with pytest.raises(RunError, match="no tokenizer"):
        trainer_of(directory, tokenizer=False).step(episodes)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_masked_head_equals_autograd_over_what_is_allowed(recompute: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    count, width, vocabulary = 9, 6, 21
    hidden = torch.randn(count, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    temperatures = torch.rand(count, generator=generator) + 0.5
    allowed = torch.rand(count, vocabulary, generator=generator) < 0.4
    allowed[0] = True
    targets = torch.randint(vocabulary, (count,), generator=generator)
    allowed[torch.arange(count), targets] = True
    padded = torch.nn.functional.pad(allowed, (0, -vocabulary % 8)).view(count, -1, 8)
    packed = (padded * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    found, entropy = chosen_logprobs(hidden, weight, targets, temperatures, allowed=packed, recompute=recompute)
    upstream = torch.randn(count, generator=generator)
    gradients = torch.autograd.grad((found * upstream).sum(), [hidden, weight])
    logits = (hidden @ weight.t() / temperatures[:, None]).masked_fill(~allowed, float("-inf"))
    every = torch.log_softmax(logits, dim=-1)
    wanted = every.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, -(every.exp() * every.masked_fill(~allowed, 0)).sum(-1).detach())
    for got, reference in zip(gradients, torch.autograd.grad((wanted * upstream).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(got, reference)
