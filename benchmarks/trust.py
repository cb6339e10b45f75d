"""Which lies of workers are found, how soon, at what cost; and how often honest workers are taken for liars.

    honest    10,000 episodes of a real engine in fp32 and bf16, through the learner's pass: falsely rejected, and how
              far honest numbers are from the tolerances
    kinds     each kind of lie, episode by episode: the share that each tier rejects
    lag       tokens of an older version told as the newest's: from how many steps on that shows
    swap      what becomes of completions when weights change: tokens a second, and mismatch, of the three policies
    swarm     real worker processes, one liar of each kind among honest ones, from the start
    turncoats the same, honest until they are trusted: how many episodes train the policy before each is excluded
    embedded  honest and lag of the embedded model in bf16 (not by default: it needs the model, and two minutes)

The model is the tests' two-layer one, made sharper and trained a little, so that it has preferences to lie about. Some
eight minutes alone without `embedded`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from _liars import LIES, Liar, Truth, distort
from _nat import tiny_model
from shoal.config.learner import AsyncLearner
from shoal.coordinator.trust import claims_of
from shoal.coordinator.verification import Limits, verdicts
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel, resolve
from shoal.engine.weights import to_views
from shoal.envs.base import Environment
from shoal.errors import RunError
from shoal.fabric.identity import data_dir
from shoal.learner.claims import ClaimChecker
from shoal.learner.loading import load_policy
from shoal.learner.trainer import Trainer
from shoal.planning.evidence import Surprise, objection, tolerance_of
from shoal.planning.standing import rate_that_deters
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import SamplingParams, SwapPolicy
from shoal.protocol.trust import Claim, Finding
from shoal.protocol.work import Lease
from shoal.rollout.episode import EpisodeSpec, run_episode

from _common import benchmark, emit

PARTS = ("honest", "kinds", "lag", "swap", "swarm", "turncoats")
MORE = ("embedded",)
SHARPER = 4.0
"""Times the random initial weights."""

VERSIONS = 12
"""Trained ones; the newest is the policy."""

GROUP_SIZE, GROUPS, MAX_TOKENS = 4, 6, 8
SWARM_S = 150.0
"""A run with liars is ended after this at the latest."""

Tensors = dict[str, torch.Tensor]


def say(text: str) -> None:
    print(f"trust: {text}", file=sys.stderr, flush=True)


@dataclass
class World:
    """A model in versions, the environment, and who acts and checks."""

    model: LocalModel
    env: Environment
    versions: list[Tensors]
    context_tokens: int
    max_tokens: int

    @property
    def newest(self) -> int:
        return len(self.versions) - 1

    def engine(self, dtype: str, *, sequences: int = 64, on_swap: SwapPolicy = "keep") -> LocalEngine:
        return LocalEngine(
            self.model,
            dtype=dtype,
            device="cpu",
            max_sequences=sequences,
            cache_tokens=sequences * self.context_tokens,
            context_tokens=self.context_tokens,
            on_swap=on_swap,
        )

    def checker(self, engine: LocalEngine, dtype: str, on_swap: SwapPolicy = "keep") -> ClaimChecker:
        return ClaimChecker(
            self.model,
            engine.tokenizer,
            lambda version: to_views(self.versions[version]),
            dtype=dtype,
            device=torch.device("cpu"),
            context_tokens=self.context_tokens,
            on_swap=on_swap,
        )

    def lease(self, number: int, size: int = GROUP_SIZE) -> Lease:
        return Lease(
            id=f"g{number}.0",
            kind="train",
            group=f"g{number}",
            tasks=(self.env.task("train", number, 0),) * size,
            seeds=tuple(random.Random(f"{number}/{index}").getrandbits(62) for index in range(size)),
            params=SamplingParams(max_tokens=self.max_tokens),
            min_version=0,
            exact_version=False,
            duration_s=60.0,
        )

    async def act(self, engine: LocalEngine, spec: EpisodeSpec) -> Episode:
        return await run_episode(spec, engine, engine.tokenizer, self.env.fresh(), context_tokens=self.context_tokens)


def specs_of(lease: Lease) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(
            id=f"{lease.id}/{index}",
            group=lease.group,
            index=index,
            task=lease.tasks[index],
            params=SamplingParams(max_tokens=lease.params.max_tokens, seed=lease.seeds[index]),
            worker="bench",
        )
        for index in range(len(lease.tasks))
    ]


async def tiny_world(folder: Path) -> World:
    """The tests' model, sharper, trained `VERSIONS` steps at the tests' rate."""
    directory = tiny_model(folder / "model")
    from tiny import FirstDigit

    model = LocalModel("tiny", directory)
    sharper = {n: t.float() * (SHARPER if t.ndim > 1 else 1.0) for n, t in model.tensors().items()}
    policy = load_policy(model, "fp32", "cpu")
    policy.load_state_dict(sharper, strict=False)
    trainer = Trainer(policy, AsyncLearner(lr=3e-3, microbatch_tokens=1024))
    world = World(model, FirstDigit(name="digit"), [copied(trainer.tensors())], 64, MAX_TOKENS)
    async with world.engine("fp32") as engine:
        for step in range(VERSIONS):
            await engine.load_weights(step, to_views(world.versions[step]))
            leases = [world.lease(step * GROUPS + n) for n in range(GROUPS)]
            episodes = await asyncio.gather(*(world.act(engine, s) for lease in leases for s in specs_of(lease)))
            metrics = trainer.step(episodes)
            world.versions.append(copied(trainer.tensors()))
    trainer.save_pretrained(folder / "trained", engine.tokenizer.hf)
    say(f"a policy of {VERSIONS} steps, reward {metrics['reward']:.2f}")
    return world


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def judged(finding: Finding, dtype: str) -> str:
    """Which test rejects an episode; empty where none does."""
    if finding.problem:
        return "tokenizer"
    tolerance = tolerance_of("cpu", dtype)
    if objection(finding.tokens, finding.difference, 0.0, tolerance):
        return "difference"
    return "displacement" if objection(finding.tokens, 0.0, finding.displacement, tolerance) else ""


async def claims_from(
    world: World, engine: LocalEngine, count: int, act: Callable[[EpisodeSpec], Awaitable[Episode]], first: int = 10_000
) -> tuple[list[Claim], list[Episode], list[str]]:
    """Episodes of whole groups through tiers 1 and 2: what is left as claims, what was refused, and why."""
    claims: list[Claim] = []
    refused: list[Episode] = []
    reasons: list[str] = []
    at_once = 16
    for start in range(0, max(1, count // GROUP_SIZE), at_once):
        leases = [world.lease(first + start + n) for n in range(min(at_once, count // GROUP_SIZE - start))]
        groups = await asyncio.gather(*(asyncio.gather(*(act(s) for s in specs_of(lease))) for lease in leases))
        for lease, group in zip(leases, groups, strict=True):
            limits = Limits(world.context_tokens, 2**31)
            found = await verdicts(lease, tuple(group), "bench", world.newest, limits, {world.env.name: world.env})
            for claim, (verdict, played) in zip(
                claims_of(lease, group, [played for _, played in found]), found, strict=True
            ):
                if verdict == "accepted":
                    claims.append(claim)
                else:
                    refused.append(claim.episode)
                    reasons.append(f"{verdict}: {played.problem[:60]}")
    return claims, refused, reasons


def check_all(checker: ClaimChecker, claims: Sequence[Claim]) -> tuple[list[Finding], float]:
    started = time.perf_counter()
    found = [f for at in range(0, len(claims), 64) for f in checker.check(claims[at : at + 64])]
    return found, time.perf_counter() - started


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


async def honest(world: World, dtype: str, count: int, name: str = "tiny") -> dict[str, Any]:
    """Honest episodes: how many are rejected. The engine's batches are small, so they round unlike the checker's."""
    async with world.engine(dtype, sequences=12) as engine:
        await engine.load_weights(world.newest, to_views(world.versions[world.newest]))
        checker = world.checker(engine, dtype)
        started = time.perf_counter()
        claims, refused, _ = await claims_from(world, engine, count, lambda spec: world.act(engine, spec))
        drawn_s = time.perf_counter() - started
        found, seconds = check_all(checker, claims)
    tolerance, surprise, worst_z = tolerance_of("cpu", dtype), Surprise(), 0.0
    rejected = Counter(judged(finding, dtype) for finding in found)
    del rejected[""]
    for finding in found:
        surprise.add(finding.surprise, finding.variance)
        worst_z = max(worst_z, abs(surprise.z))
    tokens = sum(f.tokens for f in found)
    use = [f.difference / tolerance.difference.at(f.tokens) for f in found]
    moved = [f.displacement / tolerance.displacement.at(f.tokens) for f in found]
    row = {
        "part": "honest",
        "model": name,
        "dtype": dtype,
        "episodes": len(found) + len(refused),
        "tokens": tokens,
        "refused_by_tiers_1_2": len(refused),
        "rejected": rejected.total(),
        "by": dict(rejected),
        "difference_mean": statistics.fmean(f.difference for f in found),
        "difference_p999": quantile([f.difference for f in found], 0.999),
        "difference_max": max(f.difference for f in found),
        "difference_max_of_tolerance": max(use),
        "displacement_mean": statistics.fmean(f.displacement for f in found),
        "displacement_p999": quantile([f.displacement for f in found], 0.999),
        "displacement_max_of_tolerance": max(moved),
        "surprise_worst_z": worst_z,
        "drawn_tokens_per_s": tokens / drawn_s,
        "checked_tokens_per_s": tokens / seconds,
    }
    say(f"honest {name} {dtype}: {row['rejected']} of {row['episodes']} rejected, {json.dumps(row)}")
    return row


def is_lie(told: Episode, true: Episode) -> bool:
    """Whether an episode is not what an honest worker would have handed in for the same lease."""
    if told.reward != true.reward or len(told.turns) != len(true.turns):
        return True
    for one, other in zip(told.turns, true.turns, strict=True):
        same = (one.context_ids, one.completion.token_ids) == (other.context_ids, other.completion.token_ids)
        if not same or one.completion.finish != other.completion.finish:
            return True
        pairs = zip(one.completion.logprobs, other.completion.logprobs, strict=True)
        if max(abs(x - y) for x, y in pairs) > 1e-3:
            return True
    return False


async def kinds(world: World, count: int, dtype: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each kind of lie, episode by episode; what a liar happens to tell truly is counted apart."""
    rows = []
    policy, first = to_views(world.versions[world.newest]), to_views(world.versions[0])
    async with world.engine(dtype) as engine:
        await engine.load_weights(world.newest, policy)
        honest_claims, _, _ = await claims_from(world, engine, count, lambda spec: world.act(engine, spec))
        true = {claim.episode.id: claim.episode for claim in honest_claims}
    for kind in names:
        async with world.engine(dtype) as engine:
            await engine.load_weights(world.newest, distort(kind, policy, first))
            truths = Truth(world.model, dtype)

            async def truth(episode: Episode, truths: Truth = truths) -> tuple[float, ...]:
                return await asyncio.to_thread(truths.logprobs, policy, episode)

            async def score(episode: Episode) -> tuple[float, dict[str, float]]:
                step = await world.env.fresh().judge(episode)
                return step.reward, dict(step.info)

            liar = Liar(
                kind,
                lambda spec, engine=engine: world.act(engine, spec),  # type: ignore[misc]
                score,
                engine.tokenizer,
                truth,
                random.Random(1),
            )
            claims, refused, reasons = await claims_from(world, engine, count, liar.act)
            found, seconds = check_all(world.checker(engine, dtype), claims)
        lies = [
            finding
            for claim, finding in zip(claims, found, strict=True)
            if is_lie(claim.episode, true[claim.episode.id])
        ]
        refused_lies = sum(is_lie(episode, true[episode.id]) for episode in refused)
        by = Counter(judged(finding, dtype) for finding in lies)
        surprise, until_surprised = Surprise(), 0
        for number, finding in enumerate(found, start=1):
            surprise.add(finding.surprise, finding.variance)
            until_surprised = until_surprised or (number if surprise.objection else 0)
        told = max(1, len(lies) + refused_lies)
        row = {
            "part": "kinds",
            "kind": kind,
            "dtype": dtype,
            "episodes": len(found) + len(refused),
            "lies": len(lies) + refused_lies,
            "detected": (told - by[""]) / told,
            "by_tiers_1_2": refused_lies / told,
            "by_tokenizer": by["tokenizer"] / told,
            "by_difference": by["difference"] / told,
            "by_displacement": by["displacement"] / told,
            "surprised_after_episodes": until_surprised,
            "difference_median": statistics.median(f.difference for f in lies) if lies else 0.0,
            "displacement_median": statistics.median(f.displacement for f in lies) if lies else 0.0,
            "check_seconds_per_1000_tokens": 1000 * seconds / max(1, sum(f.tokens for f in found)),
        }
        say(
            f"{kind} {dtype}: {row['detected']:.3f} of {row['lies']} lies in {row['episodes']} episodes detected, "
            f"{dict(by)} {dict(Counter(reasons))}"
        )
        rows.append(row)
    return rows


async def lag(world: World, dtype: str, count: int, name: str = "tiny") -> list[dict[str, Any]]:
    """Tokens of older versions that claim to be the newest's."""
    rows = []
    async with world.engine(dtype) as engine:
        checker = world.checker(engine, dtype)
        for behind in [k for k in (0, 1, 2, 3, 4, 6, 8, 12) if k <= world.newest]:
            await engine.load_weights(world.newest, to_views(world.versions[world.newest - behind]))
            claims, _, _ = await claims_from(world, engine, count, lambda spec: world.act(engine, spec), 50_000)
            found, _ = check_all(checker, claims)
            by = Counter(judged(finding, dtype) for finding in found)
            rows.append(
                {
                    "part": "lag",
                    "model": name,
                    "dtype": dtype,
                    "behind": behind,
                    "episodes": len(found),
                    "detected": 1 - by[""] / len(found),
                    "by_difference": by["difference"] / len(found),
                    "difference_mean": statistics.fmean(f.difference for f in found),
                    "displacement_mean": statistics.fmean(f.displacement for f in found),
                }
            )
            say(f"lag {name} {dtype}: {json.dumps(rows[-1])}")
    return rows


async def keep_acting(world: World, engine: LocalEngine, lane: int, claims: list[Claim], over: asyncio.Event) -> None:
    """One episode after the other, each as a claim."""
    number = lane
    while not over.is_set():
        lease = world.lease(number, 1)
        number += 16
        episode = await world.act(engine, specs_of(lease)[0])
        opening = (await world.env.fresh().reset(lease.tasks[0])).messages
        most = lease.params.max_tokens
        claims.append(Claim(episode=episode, seed=lease.seeds[0], max_tokens=most, stop=(), opening=opening))


async def swaps(world: World, seconds: float) -> list[dict[str, Any]]:
    """Long completions while weights change all the time, by policy."""
    rows = []
    longer = World(world.model, world.env, world.versions, 256, 160)
    for policy in ("keep", "recompute", "finish"):
        async with longer.engine("fp32", sequences=16, on_swap=policy) as engine:
            engine.tokenizer.end_ids = frozenset()
            await engine.load_weights(0, to_views(longer.versions[0]))
            claims: list[Claim] = []
            over = asyncio.Event()
            actors = [asyncio.create_task(keep_acting(longer, engine, lane, claims, over)) for lane in range(16)]
            started, drawn = time.perf_counter(), engine.stats().tokens_drawn
            pauses: list[float] = []
            waits: list[float] = []
            version = 0
            while time.perf_counter() - started < seconds:
                await asyncio.sleep(seconds / 12)
                version += 1
                asked = time.perf_counter()
                pauses.append(
                    await engine.load_weights(version, to_views(longer.versions[version % len(longer.versions)]))
                )
                waits.append(time.perf_counter() - asked)
            took = time.perf_counter() - started
            drawn = engine.stats().tokens_drawn - drawn
            over.set()
            await asyncio.gather(*actors)
            # Against a pass that has every position under the token's own version: what the learner computes.
            read = {v: longer.versions[v % len(longer.versions)] for v in range(version + 1)}
            plain = World(longer.model, longer.env, [read[v] for v in range(version + 1)], 256, 160)
            found, _ = check_all(plain.checker(engine, "fp32", "recompute"), claims[:200])
            own, _ = check_all(plain.checker(engine, "fp32", policy), claims[:200])
        rows.append(
            {
                "part": "swap",
                "policy": policy,
                "tokens_per_s": drawn / took,
                "swaps": version,
                "pause_ms": 1000 * statistics.fmean(pauses),
                "wait_ms": 1000 * statistics.fmean(waits),
                "mismatch_mean": statistics.fmean(f.difference for f in found),
                "mismatch_max": max(f.difference for f in found),
                "mismatch_as_drawn": max(f.difference for f in own),
                "episodes_mixed": statistics.fmean(
                    len(set(c.episode.turns[0].completion.versions)) > 1 for c in claims
                ),
            }
        )
        say(f"swap: {json.dumps(rows[-1])}")
    return rows


# Real processes


@contextlib.contextmanager
def process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment))
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.wait(20.0)
            except subprocess.TimeoutExpired:
                started.kill()
        started.wait()


def swarm(folder: Path, part: str, honest_for: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A run with two honest workers and one liar of each kind, until all liars are excluded or the time is over."""
    run = folder / "runs" / part
    config = folder / f"{part}.toml"
    config.write_text(tomli_w.dumps(swarm_config(folder, part)))
    here = Path(__file__).parent
    search = [str(here), str(here.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "SHOAL_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"]
    with ExitStack() as stack:
        train = stack.enter_context(process(command, environment, folder / f"{part}.log"))
        await_file(run / "ticket.txt", train, folder / f"{part}.log")
        ticket = (run / "ticket.txt").read_text().strip()
        names = {"honest-0": "", "honest-1": "", **{kind: kind for kind in kinds}}
        for name, kind in names.items():
            call = f"import _liars; _liars.work({ticket!r}, {kind!r}, {name!r}, {str(run)!r}, {honest_for})"
            stack.enter_context(process([sys.executable, "-c", call], environment, folder / f"{part}-{name}.log"))
        started, told = time.monotonic(), 0
        while train.poll() is None and time.monotonic() - started < SWARM_S:
            time.sleep(1.0)
            out = {event["node"] for event in events(run, "worker.excluded")}
            if len(out) != told:
                told = len(out)
                say(f"{part}: {told} of {len(kinds)} excluded after {time.monotonic() - started:.0f} s")
            if told >= len(kinds):
                break
        time.sleep(2.0)
        if train.poll() is None:
            train.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                train.wait(30.0)
    return swarm_rows(run, part, names)


def swarm_config(folder: Path, part: str) -> dict[str, Any]:
    return {
        "run": {"name": part, "dir": str(folder / "runs"), "steps": 100_000},
        "model": {"name": str(folder / "trained"), "dtype": "fp32", "context_tokens": 64},
        "envs": {"digit": {"type": "tiny:FirstDigit"}},
        "rollout": {
            "group_size": GROUP_SIZE,
            "groups_per_step": 8,
            "max_tokens": MAX_TOKENS,
            "lease_timeout_s": 60.0,
            "lookahead_groups": 64,
        },
        "learner": {"mode": "async", "max_staleness": 6, "lr": 3e-4, "device": "cpu", "checkpoint_every": 0},
        "workers": {"count": 0, "device": "cpu"},
        "eval": {"before": False, "after": False, "max_tokens": 8},
        "capacity": {"pace": False},
        "trust": {"probation": 16},
        "output": {"plots": False},
    }


def await_file(path: Path, train: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if train.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the run did not begin: {log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.1)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [event for event in found if event["kind"] == kind]


def swarm_rows(run: Path, part: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    ids = {event["data"]["name"]: event["node"] for event in events(run, "node.joined")}
    refused: Counter[str] = Counter()
    for event in events(run, "rollout.refused"):
        refused[event["node"]] += event["data"]["count"]
    consumed: Counter[str] = Counter()
    for path in (run / "episodes").glob("*.jsonl"):
        consumed.update(json.loads(line)["worker"] for line in path.read_bytes().splitlines())
    excluded = {event["node"]: event for event in reversed(events(run, "worker.excluded"))}
    joined = {event["node"]: event["time"] for event in reversed(events(run, "node.joined"))}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = steps[-1] if steps else {}
    rows = []
    for name, kind in names.items():
        node = ids.get(name, "")
        event = excluded.get(node)
        rows.append(
            {
                "part": part,
                "kind": kind or "honest",
                "excluded": event is not None,
                "seconds_to_exclusion": event["time"] - joined[node] if event else None,
                "rejected": refused[node],
                "consumed": consumed[node],
                "reason": event["data"]["reason"] if event else "",
            }
        )
        say(json.dumps(rows[-1]))
    cost = {key.removeprefix("trust/"): value for key, value in last.items() if key.startswith("trust/")}
    train_s = sum(line.get("train_s", 0.0) for line in steps)
    rows.append({"part": part, "kind": "cost", "steps": len(steps), "train_s": train_s, **cost})
    say(json.dumps(rows[-1]))
    return rows


def embedded_world() -> World:
    """The embedded model in bf16, as it comes."""
    from shoal.envs.registry import make

    model = resolve("embedded", data_dir() / "models")
    return World(model, make("arithmetic", {}, name="sums"), [copied(model.tensors())], 256, 24)


async def train_embedded(world: World, steps: int = 4) -> None:
    """A few versions of it, each a step of the demo's rate away from the one before, whatever there was to learn."""
    from msgspec.structs import replace

    trainer = Trainer(load_policy(world.model, "bf16", "cpu"), AsyncLearner(lr=1e-5, microbatch_tokens=1024))
    async with world.engine("bf16", sequences=32) as engine:
        for step in range(steps):
            await engine.load_weights(step, to_views(world.versions[step]))
            episodes: list[Episode] = []
            for n in range(4):
                episodes += await asyncio.gather(*(world.act(engine, s) for s in specs_of(world.lease(step * 4 + n))))
            trainer.step([replace(e, reward=float(e.index % 2)) for e in episodes])
            world.versions.append(copied(trainer.tensors()))
            say(f"embedded: step {step + 1}")


async def measure(parts: Sequence[str], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    world = await tiny_world(folder)
    if "honest" in parts:
        rows += [await honest(world, dtype, options.episodes) for dtype in ("fp32", "bf16")]
    if "kinds" in parts:
        rows += await kinds(world, options.lies, "fp32", tuple(LIES))
        rows += await kinds(world, options.lies, "bf16", ("old_model", "quantised_model", "fabricated_logprobs"))
    if "lag" in parts:
        for dtype in ("fp32", "bf16"):
            rows += await lag(world, dtype, options.lies)
    if "swap" in parts:
        rows += await swaps(world, 12.0)
    if "embedded" in parts:
        large = embedded_world()
        rows.append(await honest(large, "bf16", options.embedded_episodes, "embedded"))
        await train_embedded(large)
        rows += await lag(large, "bf16", options.embedded_episodes // 4, "embedded")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *MORE), default=PARTS)
    parser.add_argument("--episodes", type=int, default=10_000, help="honest ones, in each number format")
    parser.add_argument("--lies", type=int, default=400, help="episodes of each kind")
    parser.add_argument("--embedded-episodes", type=int, default=512)
    parser.add_argument("--kinds", nargs="+", choices=tuple(LIES), default=tuple(LIES), help="liars of the swarm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-trust-") as scratch:
        folder = Path(scratch)
        rows = asyncio.run(measure(options.only, folder, options))
        if "swarm" in options.only:
            rows += swarm(folder, "swarm", 0, options.kinds)
        if "turncoats" in options.only:
            rows += swarm(folder, "turncoats", 24, options.kinds)
    emit(rows, headline(rows))


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        match row["part"]:
            case "honest":
                share = (row["rejected"] + row["refused_by_tiers_1_2"]) / row["episodes"]
                found[f"false_rejections_{row['model']}_{row['dtype']}"] = share
            case "kinds":
                suffix = "" if row["dtype"] == "fp32" else f"_{row['dtype']}"
                found[f"detected_{row['kind']}{suffix}"] = row["detected"]
            case "swap":
                found[f"tokens_per_s_{row['policy']}"] = row["tokens_per_s"]
            case "lag" if row["detected"] >= 0.5:
                key = f"least_lag_{row['model']}_{row['dtype']}"
                found[key] = min(found.get(key, row["behind"]), row["behind"])
            case "swarm" | "turncoats" if row["kind"] not in ("honest", "cost"):
                part = row["part"]
                found[f"{part}_excluded"] = found.get(f"{part}_excluded", 0) + row["excluded"]
                found[f"{part}_consumed_max"] = max(found.get(f"{part}_consumed_max", 0), row["consumed"])
            case "swarm" | "turncoats" if row["kind"] == "honest":
                found[f"{row['part']}_honest_rejected"] = (
                    found.get(f"{row['part']}_honest_rejected", 0) + row["rejected"]
                )
            case _:
                pass
    # A lie saves the price of an episode; an exclusion costs what some 64 would have earned.
    found["rate_that_deters"] = rate_that_deters(1.0, 64.0)
    return found


if __name__ == "__main__":
    benchmark(main)
