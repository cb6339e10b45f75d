"""Speculation over stages with delays: the requester and one stage on one machine, two stages elsewhere.

Run as a script, it is the requester, inside a namespace of the lab.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from _stages import ready, settings
from shoal.config.speculation import MarginRule, SemanticRule
from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.engine.sequence import Drawn
from shoal.engine.source import LocalModel
from shoal.engine.speculation import profile
from shoal.engine.speculation.drafters import Drafters
from shoal.engine.speculation.drafting import Drafting, Fixed, Gammas
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.speculating import Round, Speculation
from shoal.engine.speculation.strict import Strict
from shoal.errors import RunError
from shoal.lab.network import Network, Node
from shoal.lab.packet import packet_lab
from shoal.planning.speculation import Pacer
from shoal.protocol.chat import Message
from shoal.protocol.sampling import SampleRequest, SamplingParams
from shoal.serving.pipeline import serving_over
from shoal.serving.speculation import rule_of

START_S = 300.0
HOPS = 3
"""Links of the ring: its first stage is on the requester's machine, the other two are not."""

GAMMA = 5


async def ring(
    model: LocalModel,
    draft: Path | None,
    texts: Sequence[str],
    delays_ms: Sequence[float],
    *,
    rounds: int,
    tokens: int,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of every delay and way of decoding, and what they come to."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for delay_ms in delays_ms:
        found = await _cell(model, draft, texts, delay_ms, rounds, tokens)
        by_name = {row["variant"]: row for row in found}
        plain, strict = by_name["plain"], by_name["strict"]
        for row in found:
            row |= {"part": "ring", "delay_ms": delay_ms, "over_plain": row["tokens_per_s"] / plain["tokens_per_s"]}
            row["over_strict"] = row["tokens_per_s"] / strict["tokens_per_s"]
        rows += found
        at = f"{delay_ms:g}ms"
        headline[f"strict_speedup_{at}"] = strict["over_plain"]
        blocking = by_name["strict, blocking"]
        headline[f"round_model_error_{at}"] = blocking["round_model_error"]
        # What the formula promises at the tokens a round that were measured, without frames ahead.
        promised = blocking["tokens_per_round"] / blocking["formula_s"] * plain["step_s"]
        headline[f"speedup_over_formula_{at}"] = strict["over_plain"] / promised
        headline[f"frames_over_blocking_{at}"] = strict["tokens_per_s"] / blocking["tokens_per_s"]
        for name in ("margin", "semantic"):
            if name in by_name:
                headline[f"{name}_over_strict_{at}"] = by_name[name]["over_strict"]
    return rows, headline


async def _cell(
    model: LocalModel, draft: Path | None, texts: Sequence[str], delay_ms: float, rounds: int, tokens: int
) -> list[dict[str, Any]]:
    names = ("home", "one", "two")
    network = Network(nodes=tuple(Node(name=name, delay_ms=delay_ms / 2) for name in names), tick_ms=0.1)
    asked = {"model": str(model.directory), "draft": str(draft) if draft else None, "texts": list(texts)}
    asked |= {"rounds": rounds, "tokens": tokens, "delay_s": delay_ms / 1000}
    async with packet_lab(network) as lab:
        script = [sys.executable, str(Path(__file__)), lab.address("home"), json.dumps(asked)]
        requester = await lab.run("home", script, stdout=asyncio.subprocess.PIPE)
        assert requester.stdout is not None
        async with asyncio.timeout(START_S):
            ticket = (await requester.stdout.readline()).decode().strip()
        for name in ("one", "two"):
            worker = [sys.executable, "-m", "shoal.cli", "worker", ticket, "--stage", "--name", name]
            worker += ["--stage-host", lab.address(name), "--threads", "1", "--device", "cpu"]
            # The weights' way is not what is measured.
            await lab.run(name, [*worker, "--local-model", str(model.directory)])
        async with asyncio.timeout(4 * START_S):
            line = await requester.stdout.readline()
            if not line:
                raise RunError("the requester ended.", "See what it said above.")
            found: list[dict[str, Any]] = json.loads(line)
            await requester.wait()
    return found


async def _requester(host: str, asked: dict[str, Any]) -> None:
    model = LocalModel("ring", Path(asked["model"]))
    draft = LocalModel("draft", Path(asked["draft"])) if asked["draft"] else None
    drafters = Drafters(draft, model, torch.bfloat16, torch.device("cpu"))
    known = profile.load(model.directory)
    ways: dict[str, tuple[Rule, Callable[[], Gammas]] | None] = {
        "plain": None,
        "strict": (Strict(), Pacer),
        "strict, blocking": (Strict(), lambda: Fixed(GAMMA)),
    }
    if draft is not None:
        ways["margin"] = rule_of(MarginRule(), known), Pacer
        ways["semantic"] = rule_of(SemanticRule(), known), Pacer
    with_stages = settings(3, 1, "bf16", local_stages=1, stage_host=host, in_flight=1)
    async with serving_over(model, "ring", with_stages) as served:
        print(served.ticket, flush=True)
        engine = served.engine
        engine.tokenizer.end_ids = frozenset()
        prompts = [tuple(engine.tokenizer.prompt([Message("user", text)])) for text in asked["texts"]]
        await ready(served, 3)
        await _stream(engine, prompts[0], 4)
        seen: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
        flown: dict[str, list[Round]] = {name: [] for name in ways}
        made: dict[str, Speculation | None] = {}
        for name, way in ways.items():
            made[name] = None
            if way is not None:
                drafting = Drafting(drafters.make(engine.lane_slots, engine.lane_tokens), way[1]())
                made[name] = Speculation(drafting, way[0], on_round=flown[name].append)
        for turn in range(asked["rounds"] + 1):
            for number, prompt in enumerate(prompts):
                for name in ways:
                    # One ring for all ways: stages do not know how steps came about, and nobody draws now.
                    engine.lanes[0]._batcher.speculation = made[name]
                    took = await _stream(engine, prompt, asked["tokens"])
                    if turn:  # the first warms up, and lets the pacers measure
                        seen[name].append(took)
                    else:
                        flown[name].clear()
                print(f"ring {asked['delay_s']:g} s: turn {turn}, prompt {number + 1}", file=sys.stderr, flush=True)
    print(json.dumps([_row(name, seen[name], flown[name], asked["delay_s"]) for name in ways]), flush=True)


async def _stream(engine: PipelineEngine, prompt: tuple[int, ...], tokens: int) -> tuple[int, float]:
    """Tokens after the first, and the seconds they took."""
    times: list[float] = []
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    async with aclosing(engine.draws(SampleRequest(prompt, params))) as draws:
        async for drawn in draws:
            if isinstance(drawn, Drawn):
                times.append(time.perf_counter())
    return len(times) - 1, times[-1] - times[0]


def _row(name: str, seen: list[tuple[int, float]], rounds: list[Round], delay_s: float) -> dict[str, Any]:
    tokens, seconds = sum(count for count, _ in seen), sum(took for _, took in seen)
    row: dict[str, Any] = {"variant": name, "tokens_per_s": tokens / seconds, "step_s": seconds / tokens}
    if not rounds:
        return row
    row["tokens_per_round"] = statistics.fmean(each.accepted[0] + 1 for each in rounds)
    row["ahead"] = sum(each.ahead for each in rounds) / len(rounds)
    row["gamma"] = statistics.fmean(each.gammas[0] for each in rounds)
    full = [each for each in rounds if each.drafted[0] == GAMMA and not each.ahead]
    if name == "strict, blocking" and full:
        formula = statistics.median(each.draft_s + each.verify_s for each in full) + HOPS * delay_s
        measured = statistics.median(each.draft_s + each.verify_s + each.delay_s for each in full)
        row |= {"round_s": measured, "formula_s": formula, "round_model_error": abs(measured / formula - 1)}
    return row


if __name__ == "__main__":
    asyncio.run(_requester(sys.argv[1], json.loads(sys.argv[2])))
