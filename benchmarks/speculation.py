"""Speculative decoding: accept lengths and speed by drafter and rule, batches, stages with delays, a head's training.

The embedded model, bf16, one thread, greedy. Parts:

    verify   seconds of a pass by tokens a row, and how far the round's formula (t_draft + T_verify(γ+1)) is from rounds
    rules    tokens a round, tokens a second, agreement with plain decoding, tokens that are not the model's own, and
             log-likelihood a token, for each task, drafter and rule; plain decoding between them, so that a busy
             neighbour slows all. Each prompt is recorded, so an interrupted part goes on where it was (--fresh: anew)
    batch    1, 8 and 32 sequences together: adaptive drafting beside plain decoding, in turn
    ring     three stages, two of them elsewhere: delays of 20 and 50 ms on every link, in namespaces (root, Linux);
             plain, strict, strict without frames ahead, margin and semantic in turn
    accuracy 500 held-out questions of a configuration's environments (--config) under strict, margin and semantic, pair
             by pair; wants a model that is good at them (--model runs/NAME/model) and --draft, else it is left out
    train    seconds of a training step of a head, and from that the time for 0.5 M tokens (not the training itself)

    shoal bench speculation
    shoal bench speculation -- --only verify batch
    shoal bench speculation -- --only rules ring --draft runs/head/head --prompts 4 --tokens 64

Tasks: `copy` (the answer repeats the question) and `chat` (open questions), built in. With SHOAL_DATA, also `gsm8k` and
`humaneval` from gsm8k/test.jsonl and humaneval/HumanEval.jsonl in it. The lossy rules need a drafter that is wrong in
interesting ways, so with --draft only; they take calibrated thresholds where the model has them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _speculating import CONTEXT_TOKENS, Machine, Records, say, tasks
from _speculating_accuracy import accuracy
from _speculating_ring import ring
from shoal.config.speculation import MarginRule, SemanticRule
from shoal.engine.speculation import eagle_training, profile
from shoal.engine.speculation.drafting import Fixed, Gammas
from shoal.engine.speculation.eagle import feature_depths
from shoal.engine.speculation.eagle_files import head_config, new_head
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.typical import Typical
from shoal.engine.speculation.writing import TargetText
from shoal.learner.optimizer import MasterAdamW
from shoal.planning.rounds import Curve, Ring
from shoal.planning.speculation import Pacer
from shoal.serving.speculation import rule_of

from _common import benchmark, emit

PARTS = ("verify", "rules", "batch", "ring", "accuracy", "train")
GAMMA = 5
WIDTHS = (1, 2, 4, 6, 8, 16)
BATCHES = (1, 8, 32)
BATCH_TOKENS = 128
ESTIMATED_TOKENS = 500_000

Result = tuple[list[dict[str, Any]], dict[str, float]]


def verify(machine: Machine) -> Result:
    """T_verify, and the formula beside real rounds."""
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    cache = machine.cache(1, CONTEXT_TOKENS)
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
    # Copying, so that look-up has something to propose in every round.
    prompt = machine.prompt(tasks(1)["copy"][0])
    rounds = machine.decode([prompt], 64, Strict(), Fixed(GAMMA)).rounds
    rounds = [each for each in rounds if each.drafted[0] == GAMMA]
    drafted = statistics.median(each.draft_s for each in rounds)
    model = Ring(Curve.measured(seconds), Curve(((0, 0.0), (GAMMA, drafted))))
    measured = statistics.median(each.draft_s + each.verify_s for each in rounds)
    error = abs(measured / model.round_s(GAMMA) - 1)
    rows.append(
        {"part": "verify", "round_ms": measured * 1e3, "formula_ms": model.round_s(GAMMA) * 1e3, "error": error}
    )
    return rows, {"verify_8_over_1": seconds[8] / seconds[1], "round_model_error_local": error}


def variants(machine: Machine, draft: Path | None) -> dict[str, dict[str, Any]]:
    """What is compared, as `Machine.decode` takes it."""
    found: dict[str, dict[str, Any]] = {
        "plain": {"rule": Strict(), "gammas": None},
        "ngram": {"rule": Strict(), "gammas": Fixed(GAMMA)},
        "ngram tree": {"rule": Strict(), "gammas": Fixed(GAMMA), "tree_width": 3},
        "ngram adaptive": {"rule": Strict(), "gammas": Pacer()},
    }
    if draft is None:
        return found
    own = {"trained": True}
    found["drafter"] = {"rule": Strict(), "gammas": Fixed(GAMMA), **own}
    found["drafter tree"] = {"rule": Strict(), "gammas": Fixed(GAMMA), "tree_width": 3, **own}
    found["drafter adaptive"] = {"rule": Strict(), "gammas": Pacer(), **own}
    known = profile.load(machine.local.directory)
    lossy: dict[str, Rule] = {
        "margin": rule_of(MarginRule(), known),
        "margin paper": rule_of(MarginRule(theta=0.9, form="logits"), known),
        "semantic": rule_of(SemanticRule(), known),
        "typical": Typical(),
        "fly": Fly(),
    }
    return found | {name: {"rule": rule, "gammas": Fixed(GAMMA), **own} for name, rule in lossy.items()}


def rules(machine: Machine, count: int, tokens: int, draft: Path | None, fresh: bool) -> Result:
    """Accept lengths, speed and what it costs. The order of variants is the same in every prompt."""
    records = Records("speculation", fresh)
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for task, texts in tasks(count).items():
        sums: dict[str, dict[str, float]] = {}
        for number, text in enumerate(texts, 1):
            key = {"model": machine.local.name, "draft": str(draft), "task": task, "text": text, "tokens": tokens}
            prompt = machine.prompt(text)
            plain: tuple[int, ...] = ()
            for name, how in variants(machine, draft).items():
                rule = repr(how["rule"])
                own = records.get(**key, variant=name, rule=rule)
                if own is None:
                    done = machine.decode([prompt], tokens, **how)
                    one = done.completions[0]
                    wrong, total = machine.foreign([prompt], done.completions)
                    own = {"ids": one.token_ids, "tokens": done.tokens, "passes": done.passes, "seconds": done.seconds}
                    own |= {"wrong": wrong, "total": total, "logprob": sum(one.logprobs)}
                    records.put(own, **key, variant=name, rule=rule)
                ids = tuple(own["ids"])
                plain = plain or ids
                added = {name_: float(value) for name_, value in own.items() if name_ != "ids"}
                added["same"] = sum(a == b for a, b in zip(ids, plain, strict=False)) / max(len(ids), len(plain))
                into = sums.setdefault(name, dict.fromkeys(added, 0.0))
                for name_, value in added.items():
                    into[name_] += value
            say(f"{task} {number}/{len(texts)}")
        base = sums["plain"]["tokens"] / max(sums["plain"]["seconds"], 1e-9)
        for name, own in sums.items():
            per_round = own["tokens"] / max(own["passes"], 1)
            speed = own["tokens"] / max(own["seconds"], 1e-9)
            row = {"part": "rules", "task": task, "variant": name, "tokens_per_round": per_round, "tokens_per_s": speed}
            row |= {"over_plain": speed / base, "agreement": own["same"] / len(texts)}
            row |= {"foreign": own["wrong"] / own["total"], "logprob_per_token": own["logprob"] / own["total"]}
            rows.append(row)
            headline[f"tokens_per_round_{task}_{name.replace(' ', '_')}"] = per_round
    return rows, headline


def batch(machine: Machine, draft: Path | None, rounds: int) -> Result:
    """Adaptive drafting beside plain decoding, in turn: it may cost next to nothing where it does not pay."""
    texts = [text for each in tasks(4).values() for text in each]
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for size in BATCHES:
        prompts = [machine.prompt(f"{n}. {texts[n % len(texts)]}") for n in range(size)]
        makers: dict[str, Callable[[], Gammas | None]] = {"plain": lambda: None, "ngram": Pacer}
        if draft is not None:
            makers["drafter"] = Pacer
        taken: dict[str, list[float]] = {name: [] for name in makers}
        for turn in range(rounds + 1):
            for name, make in makers.items():
                done = machine.decode(prompts, BATCH_TOKENS, Strict(), make(), trained=name == "drafter", endless=True)
                if turn:  # the first warms up
                    taken[name].append(done.tokens / done.seconds)
                    say(f"batch {size} {name}: {taken[name][-1]:.1f} tokens a second")
        for name, speeds in taken.items():
            ratio = statistics.median(a / b for a, b in zip(speeds, taken["plain"], strict=True))
            rows.append(
                {"part": "batch", "sequences": size, "variant": name, "tokens_per_s": speeds, "over_plain": ratio}
            )
            if name != "plain":
                headline[f"batch{size}_{name}_over_plain"] = ratio
    return rows, headline


def train(machine: Machine) -> Result:
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
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--draft", type=Path, help="a head or a student that shoal draft train made for the model")
    parser.add_argument("--prompts", type=int, default=2, help="of each task")
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the parts batch and ring")
    parser.add_argument("--delays", type=float, nargs="+", default=[20.0, 50.0], help="ms one way, of the part ring")
    parser.add_argument("--config", default="arithmetic", help="whose questions the part accuracy asks")
    parser.add_argument("--items", type=int, default=500, help="of the part accuracy")
    parser.add_argument("--fresh", action="store_true", help="forget what the part rules has recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = Machine(options.model, options.draft)
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for part in options.only:
        say(part)
        if part == "verify":
            found = verify(machine)
        elif part == "rules":
            found = rules(machine, options.prompts, options.tokens, options.draft, options.fresh)
        elif part == "batch":
            found = batch(machine, options.draft, options.rounds)
        elif part == "ring":
            texts = tasks(options.prompts)["chat" if options.draft else "copy"]
            found = asyncio.run(
                ring(machine.local, options.draft, texts, options.delays, rounds=options.rounds, tokens=options.tokens)
            )
        elif part == "accuracy":
            if options.draft is None:
                say("left out: it needs --draft")
                continue
            found = asyncio.run(accuracy(machine.local, options.draft, options.config, options.items))
        else:
            found = train(machine)
        for row in found[0]:
            say(json.dumps(row))
        rows += found[0]
        headline |= found[1]
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
