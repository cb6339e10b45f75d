"""Workers that lie, one way each: real workers of a run whose episodes are not what they claim.

    LIES[kind](Liar) ──▶ what a worker's `_episode` does instead of acting honestly

A liar knows all that an honest worker knows: the code, the weights, its leases and their seeds. It tells as much truth
as its lie allows: log-probabilities are those of the policy wherever it has any (`claims` computes them for it).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from shoal.broadcast.tensors import TensorView
from shoal.engine.cache import KVCache
from shoal.engine.local import LocalEngine
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import from_views, to_views
from shoal.envs.base import Environment
from shoal.protocol.episode import Episode
from shoal.rollout.episode import EpisodeSpec, run_episode

QUANTISED_LEVELS = 7
"""Of 4-bit weights, on either side of zero."""

DRAWS = 4
"""Of which best-of-n hands in the best."""

COLD = 0.7
NOISE = 0.3
"""Standard deviation of what a fabricator adds to its log-probabilities, in nats."""

KEPT_VERSIONS = 8

Honest = Callable[[EpisodeSpec], Awaitable[Episode]]


def reseeded(spec: EpisodeSpec, by: int) -> EpisodeSpec:
    seed = spec.params.seed or 0
    return EpisodeSpec(**{**vars(spec), "params": replace(spec.params, seed=(seed + 7919 * by) % 2**63)})


def cooled(spec: EpisodeSpec, temperature: float) -> EpisodeSpec:
    return EpisodeSpec(**{**vars(spec), "params": replace(spec.params, temperature=temperature)})


def with_completion(episode: Episode, **changes: Any) -> Episode:
    """The episode with its only turn's completion changed."""
    (turn,) = episode.turns
    return replace(episode, turns=(replace(turn, completion=replace(turn.completion, **changes)),))


class Liar:
    """Acts for one kind of lie.

    Args:
        honest: draws an episode as it should be drawn, by the spec it is given.
        score: what the environment gives for an episode.
        truth: the policy's log-probabilities of an episode's tokens, at the run's temperature.
    """

    def __init__(
        self,
        kind: str,
        honest: Honest,
        score: Callable[[Episode], Awaitable[tuple[float, dict[str, float]]]],
        tokenizer: Tokenizer,
        truth: Callable[[Episode], Awaitable[tuple[float, ...]]],
        rng: random.Random,
    ) -> None:
        self.kind = kind
        self._honest = honest
        self._score = score
        self._tokenizer = tokenizer
        self._truth = truth
        self._rng = rng
        self._right: dict[str, Episode] = {}
        """By task: a right answer that was drawn once."""
        self._first: Episode | None = None

    async def act(self, spec: EpisodeSpec) -> Episode:
        """One episode, a lie."""
        return await LIES[self.kind](self, spec)

    async def wrong_seed(self, spec: EpisodeSpec) -> Episode:
        return await self._honest(reseeded(spec, 1))

    async def copied_answer(self, spec: EpisodeSpec) -> Episode:
        """Whatever was right once for this task is handed in for all of its rollouts."""
        episode = await self._honest(spec)
        known = self._right.get(spec.task.id)
        for attempt in range(1, 40):
            if known is not None and known.version >= spec.min_version:
                break
            drawn = await self._honest(reseeded(spec, attempt))
            known = drawn if drawn.reward > 0.5 else known
        if known is None or known.version < spec.min_version:
            return episode
        self._right[spec.task.id] = known
        return replace(episode, turns=known.turns, reward=known.reward, reward_parts=known.reward_parts)

    async def inflated_reward(self, spec: EpisodeSpec) -> Episode:
        episode = await self._honest(spec)
        return replace(episode, reward=1.0, reward_parts=dict.fromkeys(episode.reward_parts, 1.0))

    async def honest(self, spec: EpisodeSpec) -> Episode:
        """Tells the truth of a model that is not the policy (see `distort`)."""
        return await self._honest(spec)

    async def lower_temperature(self, spec: EpisodeSpec) -> Episode:
        """Samples colder and tells the log-probabilities that a sampler at the run's temperature would have told."""
        episode = replace(await self._honest(cooled(spec, COLD)), temperature=spec.params.temperature)
        return with_completion(episode, logprobs=await self._truth(episode))

    async def best_of_n(self, spec: EpisodeSpec) -> Episode:
        drawn = [await self._honest(reseeded(spec, n)) for n in range(DRAWS)]
        return max(drawn, key=lambda episode: episode.reward)

    async def early_stop(self, spec: EpisodeSpec) -> Episode:
        """Draws a third of the tokens and ends with an end token, told with the log-probability that it has."""
        episode = await self._honest(spec)
        completion = episode.turns[0].completion
        kept = max(1, len(completion.token_ids) // 3)
        ids = (*completion.token_ids[:kept], min(self._tokenizer.end_ids))
        if len(ids) > len(completion.token_ids):
            return episode
        cut = with_completion(
            episode,
            token_ids=ids,
            logprobs=completion.logprobs[: len(ids)],
            versions=completion.versions[: len(ids)],
            finish="stop",
            text=self._tokenizer.visible(ids, spec.params.stop),
        )
        cut = with_completion(cut, logprobs=await self._truth(cut))
        reward, parts = await self._score(cut)
        return replace(cut, reward=reward, reward_parts=parts)

    async def fabricated_logprobs(self, spec: EpisodeSpec) -> Episode:
        episode = await self._honest(spec)
        logprobs = episode.turns[0].completion.logprobs
        return with_completion(episode, logprobs=tuple(min(0.0, x + self._rng.gauss(0, NOISE)) for x in logprobs))

    async def replayed_episode(self, spec: EpisodeSpec) -> Episode:
        """Acts once, and hands that in for every later lease, as new as it has to be."""
        if self._first is None:
            self._first = await self._honest(spec)
        old = self._first
        fresh = EpisodeSpec(**{**vars(spec), "params": replace(spec.params, max_tokens=1)})
        shell = await self._honest(fresh)  # for id, task, group and a version that passes
        version = shell.turns[0].completion.versions[0]
        (turn,) = old.turns
        completion = replace(turn.completion, versions=(version,) * len(turn.completion.token_ids))
        turns = (replace(turn, completion=completion, observation=shell.turns[0].observation),)
        episode = replace(shell, turns=turns)
        reward, parts = await self._score(episode)
        return replace(episode, reward=reward, reward_parts=parts)


LIES: dict[str, Callable[[Liar, EpisodeSpec], Awaitable[Episode]]] = {
    "wrong_seed": Liar.wrong_seed,
    "copied_answer": Liar.copied_answer,
    "inflated_reward": Liar.inflated_reward,
    "old_model": Liar.honest,
    "quantised_model": Liar.honest,
    "lower_temperature": Liar.lower_temperature,
    "best_of_n": Liar.best_of_n,
    "early_stop": Liar.early_stop,
    "fabricated_logprobs": Liar.fabricated_logprobs,
    "replayed_episode": Liar.replayed_episode,
}


def distort(kind: str, views: Mapping[str, TensorView], first: Mapping[str, TensorView]) -> Mapping[str, TensorView]:
    """The weights that a liar puts in place of the policy's: those of its first version, or 4-bit ones."""
    if kind == "old_model":
        return first
    if kind != "quantised_model":
        return views
    return to_views({name: quantised(tensor) for name, tensor in from_views(views).items()})


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """To 4 bits, a scale for each row, and back."""
    if tensor.ndim < 2:
        return tensor.clone()
    rows = tensor.float()
    scale = rows.abs().amax(dim=1, keepdim=True) / QUANTISED_LEVELS
    return ((rows / scale).round() * scale).to(tensor.dtype)


def work(ticket_text: str, kind: str, name: str, run: str, honest_for: int) -> None:
    """Be a worker that lies once it has handed in `honest_for` honest episodes, until the run is over."""
    asyncio.run(_work(ticket_text, kind, name, Path(run), honest_for))


async def _work(ticket_text: str, kind: str, name: str, run: Path, honest_for: int) -> None:
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.ticket import Ticket
    from shoal.rollout.host import WorkerOptions, worker_identity, working
    from shoal.rollout.worker import Worker, _Job

    ticket = Ticket.decode(ticket_text)
    options = WorkerOptions(
        name=name, device="cpu", max_sequences=8, cache_tokens=2048, local_store=run / "snapshots", threads=1
    )
    with worker_identity(run / "identity" / name) as identity:
        async with (
            await Fabric.connect(identity, ticket, options.join_timeout_s) as fabric,
            working(fabric, ticket, options) as worker,
        ):
            if kind:
                await _corrupt(worker, kind, honest_for, Worker, _Job)
            await worker.run()


async def _corrupt(worker: Any, kind: str, honest_for: int, worker_kind: Any, job_kind: Any) -> None:
    """Make a worker lie: the weights that reach its engine, and the episodes that leave it."""
    rng = random.Random(os.getpid())
    engine: LocalEngine = worker._engine
    told = Truth(LocalModel("told", Path(worker._spec.model)), worker._spec.dtype)
    truths: dict[int, Mapping[str, TensorView]] = {}
    begun = 0

    async def source(version: int) -> Mapping[str, TensorView]:
        tensors = await fetch(version)
        # What is fetched lies in buffers that the next fetch reuses.
        truths[version] = to_views({name: tensor.clone() for name, tensor in from_views(tensors).items()})
        for old in sorted(truths)[1:-KEPT_VERSIONS]:
            del truths[old]
        return distort(kind, tensors, truths[min(truths)]) if begun >= honest_for else tensors

    fetch, worker.policy._source = worker.policy._source, source

    async def truth(episode: Episode) -> tuple[float, ...]:
        return await asyncio.to_thread(told.logprobs, truths[episode.version], episode)

    async def score(episode: Episode) -> tuple[float, dict[str, float]]:
        env: Environment = worker._envs[episode.task.env]
        step = await env.judge(episode)
        return step.reward, dict(step.info)

    async def honest(spec: EpisodeSpec) -> Episode:
        env = worker._envs[spec.task.env]
        return await run_episode(
            spec, engine, engine.tokenizer, env.fresh(), context_tokens=worker._spec.context_tokens
        )

    liar = Liar(kind, honest, score, engine.tokenizer, truth, rng)

    async def episode(job: Any, index: int) -> Episode:
        nonlocal begun
        lease = job.lease
        begun += lease.kind == "train"
        if lease.kind != "train" or begun <= honest_for:
            return await worker_kind._episode(worker, job, index)
        spec = EpisodeSpec(
            id=f"{lease.id}/{index}",
            group=lease.group,
            index=index,
            task=lease.tasks[index],
            params=replace(lease.params, seed=lease.seeds[index]),
            min_version=lease.min_version,
            worker=worker._link.node_id,
        )
        return await liar.act(spec)

    worker._episode = episode


class Truth:
    """What the policy gives for an episode's tokens: a forward pass of our own, which a liar has as well."""

    def __init__(self, model: LocalModel, dtype: str) -> None:
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        self._body = Decoder(model.config(), kind, torch.device("cpu"))
        self._lock = threading.Lock()

    def logprobs(self, views: Mapping[str, TensorView], episode: Episode) -> tuple[float, ...]:
        body, (turn,) = self._body, episode.turns
        arch, first = body.arch, len(turn.context_ids)
        ids = torch.tensor([[*turn.context_ids, *turn.completion.token_ids]])
        cache = KVCache(arch.num_layers, arch.num_kv_heads, arch.head_dim, 1, 1 << 40, body.dtype, body.device)
        cache.reserve(1, ids.shape[1], 0)
        with self._lock:
            body.load(from_views(views))
            hidden = body.forward(ids[:, :-1], torch.zeros(1, dtype=torch.int64), cache)
            logits = body.logits(hidden[0, first - 1 :]).float() / episode.temperature
        chosen = torch.log_softmax(logits, -1).gather(1, ids[0, first:, None])[:, 0]
        return tuple(min(0.0, x) for x in chosen.tolist())


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
