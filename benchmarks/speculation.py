"""Speculative decoding on one machine: accept lengths and speed by drafter and rule, round times, a head's training.

The embedded model, bf16, one thread, greedy, one sequence at a time. Parts:

    verify   seconds of a pass by tokens a row, and how far the round's formula (t_draft + T_verify(γ+1)) is from rounds
    rules    tokens a round, tokens a second and agreement with plain decoding, for each task, drafter and rule; every
             task's variants alternate with plain decoding, so that a busy neighbour slows all
    train    seconds of a training step of a head, and from that the time for 0.5 M tokens (not the training itself)

    shoal bench speculation
    shoal bench speculation -- --only verify train
    shoal bench speculation -- --only rules --head runs/head/head --prompts 4 --tokens 64

Tasks: `copy` (the answer repeats the question) and `chat` (open questions), built in. With SHOAL_DATA, also `gsm8k` and
`humaneval` from gsm8k/test.jsonl and humaneval/HumanEval.jsonl in it. The lossy rules need a drafter that is wrong in
interesting ways, so with --head only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel, resolve
from shoal.engine.speculation import eagle_training
from shoal.engine.speculation.cache import RoundCache
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.eagle import feature_depths
from shoal.engine.speculation.eagle_drafter import EagleDrafter
from shoal.engine.speculation.eagle_files import head_config, load_head, new_head
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.loop import Fixed, Gammas, Round, Speculated, Speculator
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.ngram import NgramDrafter
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.typical import Typical
from shoal.engine.speculation.writing import TargetText
from shoal.engine.tokenizer import Tokenizer
from shoal.learner.optimizer import MasterAdamW
from shoal.planning.rounds import Curve, Ring
from shoal.planning.speculation import Pacer
from shoal.protocol.chat import Message
from shoal.protocol.sampling import SampleRequest, SamplingParams
from shoal.rollout.host import model_cache

from _common import benchmark, emit

PARTS = ("verify", "rules", "train")
GAMMA = 5
WIDTHS = (1, 2, 4, 6, 8, 16)
ESTIMATED_TOKENS = 500_000

PASSAGES = (
    "The lighthouse keeper wrote in his log that the sea was calm, that two ships had passed, that the oil was low.",
    "def area(width, height):\n    if min(width, height) < 0:\n        raise ValueError\n    return width * height",
    "Bring 250 g of flour, 3 eggs, half a litre of milk and a pinch of salt; let the batter rest for an hour.",
    "Order 4711: 3 lamps, 12 bulbs, 2 cables. Order 4712: 1 lamp, 4 bulbs. Order 4713: 7 cables, 9 bulbs, 2 lamps.",
)
QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a rainy Sunday.",
    "What is the difference between a virus and a bacterium?",
    "Write a short letter to a landlord about a broken heater.",
)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Machine:
    """The embedded model and what every part needs of it."""

    def __init__(self) -> None:
        self.local: LocalModel = resolve("embedded", model_cache(), say)
        self.tokenizer = Tokenizer(self.local.directory)
        self.target = Decoder(self.local.config(), torch.bfloat16, torch.device("cpu"))
        self.target.load(self.local.tensors())

    def cache(self, tokens: int = 4096) -> RoundCache:
        arch = self.target.arch
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * 2
        sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, 4, tokens * token_bytes
        return RoundCache(*sizes, torch.bfloat16, torch.device("cpu"))

    def prompt(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.prompt([Message(role="user", content=text)]))

    def decode(
        self, prompt: tuple[int, ...], tokens: int, drafter: Drafter, rule: Rule, gammas: Gammas
    ) -> tuple[Speculated, list[Round], float]:
        """One completion, its rounds, and the seconds of all."""
        rounds: list[Round] = []
        speculator = Speculator(
            self.target,
            self.cache(),
            drafter,
            rule,
            gammas,
            end_ids=self.tokenizer.end_ids,
            max_nodes=32,
            on_round=rounds.append,
        )
        began = time.perf_counter()
        done = speculator.run([SampleRequest(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))])[0]
        return done, rounds, time.perf_counter() - began


def tasks(count: int) -> dict[str, list[str]]:
    found = {"copy": [f"Repeat this text exactly, twice:\n\n{p}" for p in PASSAGES], "chat": list(QUESTIONS)}
    data = Path(os.environ.get("SHOAL_DATA", "/nonexistent"))
    for name, file, key in (("gsm8k", "test.jsonl", "question"), ("humaneval", "HumanEval.jsonl", "prompt")):
        path = data / name / file
        if path.is_file():
            found[name] = [json.loads(line)[key] for line in path.read_text().splitlines()[:count]]
    return {name: texts[:count] for name, texts in found.items()}


def verify(machine: Machine) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """T_verify, and the formula beside real rounds."""
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    cache = machine.cache()
    cache.reserve(1, 256, 0)
    for repeat in range(8):
        for width in WIDTHS:
            x, start = torch.randint(5, 40_000, (1, width)), torch.tensor([200])
            began = time.perf_counter()
            machine.target.logits(machine.target.forward(x, start, cache))
            if repeat:
                times[width].append(time.perf_counter() - began)
    seconds = {width: statistics.median(each) for width, each in times.items()}
    rows = [
        {"part": "verify", "tokens": width, "ms": s * 1e3, "over_one": s / seconds[1]} for width, s in seconds.items()
    ]
    _, rounds, _ = machine.decode(machine.prompt(QUESTIONS[0]), 48, _Random(), Strict(), Fixed(GAMMA))
    drafted = statistics.median(each.draft_s for each in rounds)
    ring = Ring(Curve.measured(seconds), Curve(((0, 0.0), (GAMMA, drafted))))
    measured = statistics.median(each.draft_s + each.verify_s for each in rounds if each.drafted[0] == GAMMA)
    error = abs(measured / ring.round_s(GAMMA) - 1)
    rows.append({"part": "verify", "round_ms": measured * 1e3, "formula_ms": ring.round_s(GAMMA) * 1e3, "error": error})
    return rows, {"verify_8_over_1": seconds[8] / seconds[1], "round_model_error_local": error}


class _Random(NgramDrafter):
    """Drafts nonsense, so that every round has the same work."""

    def propose(self, gammas: Sequence[int], params: Any, uniforms_BG: Any, *, probs: bool) -> Any:
        from shoal.engine.speculation.drafts import Drafts

        return Drafts.chains([random.Random(0).choices(range(5, 40_000), k=gamma) for gamma in gammas])


def rules(
    machine: Machine, count: int, tokens: int, head: Path | None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Accept lengths and speed. The order of variants is the same in every prompt, plain decoding between them."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    loaded = load_head(head, machine.local, torch.bfloat16, torch.device("cpu")) if head else None

    def variants() -> dict[str, tuple[Drafter, Rule, Gammas]]:
        found: dict[str, tuple[Drafter, Rule, Gammas]] = {
            "plain": (NgramDrafter(), Strict(), Fixed(0)),
            "ngram": (NgramDrafter(), Strict(), Fixed(GAMMA)),
            "ngram tree": (NgramDrafter(width=3), Strict(), Fixed(GAMMA)),
            "ngram adaptive": (NgramDrafter(), Strict(), Pacer()),
        }
        if loaded is not None:
            found["eagle"] = EagleDrafter(loaded, 1, 4096), Strict(), Fixed(GAMMA)
            found["eagle tree"] = EagleDrafter(loaded, 1, 4096, width=3), Strict(), Fixed(GAMMA)
            found["eagle adaptive"] = EagleDrafter(loaded, 1, 4096), Strict(), Pacer()
            lossy: list[Rule] = [Margin(), Margin(0.5, "ratio"), Semantic(), Typical(), Fly()]
            for rule in lossy:
                name = f"eagle {rule.name}" + (" p2/p1" if isinstance(rule, Margin) and rule.form == "ratio" else "")
                found[name] = EagleDrafter(loaded, 1, 4096), rule, Fixed(GAMMA)
        return found

    for task, texts in tasks(count).items():
        sums: dict[str, dict[str, float]] = {}
        for number, text in enumerate(texts, 1):
            prompt = machine.prompt(text)
            plain: tuple[int, ...] = ()
            for name, (drafter, rule, gammas) in variants().items():
                done, rounds, _ = machine.decode(prompt, tokens, drafter, rule, gammas)
                plain = plain or done.token_ids
                same = sum(a == b for a, b in zip(done.token_ids, plain, strict=False))
                own = sums.setdefault(name, dict.fromkeys(("tokens", "rounds", "seconds", "same", "accepted"), 0.0))
                own["tokens"] += len(done.token_ids) - 1
                own["rounds"] += len(rounds)
                own["seconds"] += sum(each.draft_s + each.verify_s for each in rounds)
                own["same"] += same / max(len(done.token_ids), len(plain))
                own["accepted"] += done.accepted
            say(f"{task} {number}/{len(texts)}")
        base = sums["plain"]["tokens"] / max(sums["plain"]["seconds"], 1e-9)
        for name, own in sums.items():
            speed = own["tokens"] / max(own["seconds"], 1e-9)
            per_round = own["tokens"] / max(own["rounds"], 1)
            rows.append(
                {
                    "part": "rules",
                    "task": task,
                    "variant": name,
                    "tokens_per_round": per_round,
                    "tokens_per_s": speed,
                    "over_plain": speed / base,
                    "agreement": own["same"] / len(texts),
                }
            )
            headline[f"tokens_per_round_{task}_{name.replace(' ', '_').replace('/', '_')}"] = per_round
    return rows, headline


def train(machine: Machine) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Seconds of a training step: 8 texts of 32 + 160 tokens, 5 steps of the training-time test."""
    config = machine.local.config()
    head = new_head(head_config(config, 4096), config.hidden_size)
    ids_R = torch.arange(4096)
    head.set_vocabulary(ids_R)
    head.to(torch.bfloat16)
    embedding = machine.local.tensors()["model.embed_tokens.weight"]
    generator = random.Random(0)
    texts = [
        TargetText(n, tuple(generator.choices(range(4096), k=32)), tuple(generator.choices(range(4096), k=160)))
        for n in range(8)
    ]
    teacher = eagle_training.Teacher(machine.target, feature_depths(config.num_hidden_layers), ids_R)
    optimizer = MasterAdamW(dict(head.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=0.5)
    plan = eagle_training.Plan(2, 8, 4, 5, lambda step: 1e-4, 0)
    times, cpu, began, cpu_began = [], [], time.perf_counter(), time.process_time()
    for report in eagle_training.train(head, embedding, teacher, texts, plan, optimizer):
        times.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        began, cpu_began = time.perf_counter(), time.process_time()
        say(f"step {report.step}: {times[-1]:.1f} s, {cpu[-1]:.1f} s of the processor")
    step_s = min(times)
    tokens = 8 * 160
    hours = ESTIMATED_TOKENS / tokens * step_s / 3600
    parameters = sum(p.numel() for p in head.parameters())
    row = {
        "part": "train",
        "step_s": step_s,
        "step_cpu_s": min(cpu),
        "tokens_per_step": tokens,
        "hours_per_epoch_of_0.5M": hours,
    }
    return [row | {"parameters": parameters}], {"train_tokens_per_s": tokens / step_s}


def main() -> None:
    parser = argparse.ArgumentParser(prog="shoal bench speculation")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--head", type=Path, help="a head that shoal draft train made for the embedded model")
    parser.add_argument("--prompts", type=int, default=2, help="of each task")
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = Machine()
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for part in options.only:
        say(part)
        if part == "verify":
            found = verify(machine)
        elif part == "rules":
            found = rules(machine, options.prompts, options.tokens, options.head)
        else:
            found = train(machine)
        for row in found[0]:
            say(json.dumps(row))
        rows += found[0]
        headline |= found[1]
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
