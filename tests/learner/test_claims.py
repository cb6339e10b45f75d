"""Claimed episodes under the policy and seed that they name: honest ones agree, whatever was swapped on the way; each
kind of lie shows in the number that is there for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from shoal.broadcast.tensors import TensorView
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.errors import StorageError
from shoal.learner.claims import ClaimChecker
from shoal.planning.evidence import Surprise, objection, tolerance_of
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import SamplingParams, SwapPolicy
from shoal.protocol.trust import Claim, Finding
from shoal.rollout.episode import EpisodeSpec, run_episode
from tiny import FirstDigit, TwoTurns, make_tiny_model

POLICIES: tuple[SwapPolicy, ...] = ("keep", "recompute", "finish")
TOLERANCE = tolerance_of("cpu", "fp32")


@dataclass
class Place:
    """A tiny model in several versions, each a small step from the one before."""

    directory: Path
    versions: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def views(self, version: int) -> Mapping[str, TensorView]:
        if version not in self.versions:
            raise StorageError(f"version {version} is not kept.")
        return to_views(self.versions[version])

    def checker(self, engine: LocalEngine, **settings: object) -> ClaimChecker:
        given: dict[str, object] = {"dtype": "fp32", "context_tokens": 256, "device": torch.device("cpu"), **settings}
        return ClaimChecker(LocalModel("tiny", self.directory), engine.tokenizer, self.views, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = make_tiny_model(tmp_path_factory.mktemp("claims") / "model")
    # As it comes the model finds everything equally likely; a sharper one has something to lie about.
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor.float() * (1.0 if tensor.ndim == 1 else 4.0)
        for name, tensor in LocalModel("tiny", directory).tensors().items()
    }
    made = Place(directory)
    for version in range(3):
        made.versions[version] = tensors
        tensors = {
            name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1
            else tensor
            for name, tensor in tensors.items()
        }
    return made


@asynccontextmanager
async def engine_of(place: Place, on_swap: SwapPolicy = "keep", version: int = 0) -> AsyncIterator[LocalEngine]:
    async with LocalEngine(
        LocalModel("tiny", place.directory),
        dtype="fp32",
        device="cpu",
        max_sequences=8,
        cache_tokens=4096,
        context_tokens=256,
        on_swap=on_swap,
    ) as engine:
        await engine.load_weights(version, place.views(version))
        yield engine


async def act(
    engine: LocalEngine, number: int, *, seed: int | None = None, env: type = FirstDigit, **params: object
) -> Claim:
    """One episode of the leased seed `number`, drawn with another one if a liar says so."""
    given: dict[str, object] = {"max_tokens": 24, "seed": number if seed is None else seed, **params}
    world = env(name="digit")
    task = world.task("train", number, 0)
    spec = EpisodeSpec(id=f"e{number}", group="g", index=0, task=task, params=SamplingParams(**given))  # type: ignore[arg-type]
    episode = await run_episode(spec, engine, engine.tokenizer, world, context_tokens=256)
    assert episode.outcome == "done"
    opening = (await env(name="digit").reset(task)).messages
    return Claim(episode=episode, seed=number, max_tokens=int(given["max_tokens"]), stop=(), opening=opening)  # type: ignore[call-overload]


def changed(claim: Claim, **changes: object) -> Claim:
    """The claim with its last turn's completion changed."""
    *before, turn = claim.episode.turns
    completion = replace(turn.completion, **changes)
    episode: Episode = replace(claim.episode, turns=(*before, replace(turn, completion=completion)))
    return replace(claim, episode=episode)


def why(finding: Finding) -> str:
    return finding.problem or objection(finding.tokens, finding.difference, finding.displacement, TOLERANCE)


async def test_honest_episodes_of_several_turns_agree(place: Place) -> None:
    async with engine_of(place) as engine:
        claims = [*await asyncio.gather(*(act(engine, n, env=TwoTurns) for n in range(12)))]
        found = place.checker(engine, pass_tokens=200).check(claims)
    assert [f.episode for f in found] == [c.episode.id for c in claims]
    for claim, finding in zip(claims, found, strict=True):
        assert finding.tokens == claim.episode.num_tokens and why(finding) == ""
        assert finding.difference < 1e-4 and finding.displacement < 1e-5
        assert finding.variance > 0 and finding.seconds > 0
    surprise = Surprise()
    for finding in found:
        surprise.add(finding.surprise, finding.variance)
    assert surprise.variance > 50 and abs(surprise.z) < 4


async def test_what_was_given_makes_no_lie_about_the_rest_look_smaller(place: Place) -> None:
    async with engine_of(place) as engine:
        claim = await act(engine, 3, env=TwoTurns)
        first, second = claim.episode.turns
        given = replace(claim, episode=replace(claim.episode, turns=(replace(first, given=True), second)))
        lie = changed(given, logprobs=tuple(logprob - 1.0 for logprob in second.completion.logprobs))
        lie = replace(lie, episode=replace(lie.episode, id="lie"))
        all_given = tuple(replace(turn, given=True) for turn in claim.episode.turns)
        nothing = replace(claim, episode=replace(claim.episode, id="all", turns=all_given))
        found = place.checker(engine).check([given, lie, nothing])
    assert [finding.tokens for finding in found] == [len(second.completion.token_ids)] * 2 + [0]
    assert why(found[0]) == why(found[2]) == ""
    assert found[1].difference == pytest.approx(1.0, abs=1e-3) and why(found[1])


@pytest.mark.parametrize("policy", POLICIES)
async def test_honest_episodes_agree_across_a_swap(place: Place, policy: SwapPolicy) -> None:
    async with engine_of(place, policy) as engine:
        engine.tokenizer.end_ids = frozenset()
        acting = [asyncio.create_task(act(engine, n, max_tokens=60 + 15 * n)) for n in range(8)]
        for version in (1, 2):
            drawn = engine.stats().tokens_drawn
            while engine.stats().tokens_drawn < drawn + 90 and not all(a.done() for a in acting):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            await engine.load_weights(version, place.views(version))
        claims = [*await asyncio.gather(*acting), await act(engine, 19)]
        found = place.checker(engine, on_swap=policy).check(claims)
        other = place.checker(engine, on_swap="keep" if policy == "recompute" else "recompute").check(claims)
    mixed = [set(claim.episode.turns[0].completion.versions) for claim in claims]
    if policy == "finish":
        assert all(len(versions) == 1 for versions in mixed), "each turn is of one version"
    else:
        assert max(map(len, mixed)) > 1
        assert any(why(finding) for finding in other), "how the cache came to be matters"
    assert claims[-1].episode.version == 2
    for finding in found:
        assert why(finding) == "", finding
        assert finding.difference < 1e-4 and finding.displacement < 1e-5


def _reversed(claim: Claim) -> Claim:
    return changed(claim, logprobs=claim.episode.turns[-1].completion.logprobs[::-1])


LIES: dict[str, tuple[dict[str, object], Callable[[Claim], Claim]]] = {
    "another seed": ({"seed": 1234}, lambda claim: claim),
    "a lower temperature": ({"temperature": 0.5}, lambda c: replace(c, episode=replace(c.episode, temperature=1.0))),
    "log-probabilities in another order": ({}, _reversed),
    "another version": ({}, lambda c: changed(c, versions=(2,) * c.episode.num_tokens)),
}


@pytest.mark.parametrize("kind", LIES)
async def test_lies_about_how_tokens_were_drawn_show(place: Place, kind: str) -> None:
    params, lie = LIES[kind]
    async with engine_of(place) as engine:
        engine.tokenizer.end_ids = frozenset()
        claims = [lie(await act(engine, n, **params)) for n in range(8)]  # type: ignore[arg-type]
        found = place.checker(engine).check(claims)
    assert all(why(finding) for finding in found), [(f.difference, f.displacement) for f in found]


async def test_where_seeds_are_not_checked_another_engine_may_draw(place: Place) -> None:
    async with engine_of(place) as engine:
        claims = [await act(engine, number, seed=1234) for number in range(2)]
        for seeds in (True, False):
            findings = place.checker(engine, seeds=seeds).check(claims)
            assert all(("its seed draws other tokens" in why(finding)) == seeds for finding in findings)
            assert all(finding.difference < 1e-4 for finding in findings), "log-probabilities are checked in any case"


async def test_a_colder_sampler_shows_without_seeds(place: Place) -> None:
    """One who samples colder and tells true log-probabilities: only that its tokens are too likely gives it away."""
    surprise = Surprise()
    async with engine_of(place) as engine:
        engine.tokenizer.end_ids = frozenset()
        checker = place.checker(engine)
        cold = await asyncio.gather(*(act(engine, n, temperature=0.6, max_tokens=60) for n in range(24)))
        for claim in cold:
            told = replace(claim, episode=replace(claim.episode, temperature=1.0), opening=())
            (finding,) = checker.check([told])
            assert finding.displacement == 0, "there is no seed to look up"
            surprise.add(finding.surprise, finding.variance)
    assert surprise.z > 6 and "likelier" in surprise.objection


TOLD: dict[str, tuple[str, Callable[[Claim], Claim]]] = {
    "text": ("text", lambda c: changed(c, text="7")),
    "stopped": ("nothing in it ends it", lambda c: changed(c, finish="stop")),
    "context": (
        "context is not what",
        lambda c: replace(
            c, episode=replace(c.episode, turns=(replace(c.episode.turns[0], context_ids=(2, 5, 1, 3)),))
        ),
    ),
    "vocabulary": ("beyond the vocabulary", lambda c: changed(c, token_ids=(10_000,) * c.episode.num_tokens)),
    "given up": ("there is room", lambda c: replace(c, unfinished="go on")),
}


@pytest.mark.parametrize("kind", TOLD)
async def test_what_cannot_be_needs_no_weights(place: Place, kind: str) -> None:
    words, lie = TOLD[kind]
    async with engine_of(place) as engine:
        engine.tokenizer.end_ids = frozenset()
        claim = await act(engine, 3)
        (finding,) = place.checker(engine).check([lie(claim)])
    assert words in finding.problem


async def test_a_version_that_is_gone_is_nobodys_fault(place: Place) -> None:
    async with engine_of(place) as engine:
        claim, other = await act(engine, 3), await act(engine, 4)
        gone, here = place.checker(engine).check([changed(claim, versions=(7,) * claim.episode.num_tokens), other])
    assert gone.gone and not gone.problem
    assert not here.gone and why(here) == ""
