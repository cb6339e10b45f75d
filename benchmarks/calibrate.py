"""Calibrates the lossy acceptance rules: the laxest θ and τ that keep a chosen loss, written beside the model.

Loss is the share of greedy tokens that are not the model's own likeliest where they stand (near-ties in bf16 count as
its own). A threshold is taken if the upper end of that share's one-sided 95 % interval stays below `--loss`. Thresholds
are tried by bisection, laxer ones only where a stricter one held, so it is four decodings of all prompts for each rule.

    shoal bench calibrate -- --draft runs/head/head
    shoal bench calibrate -- --model runs/NAME/model --draft runs/head/head --loss 0.01 --prompts 32 --tokens 128
    shoal bench calibrate -- --only margin --form difference --draft student

`shoal serve --rule margin` and `--rule semantic` then use what was found, unless they are given a threshold. Prompts:
those of `shoal bench speculation`; what is calibrated on them says little of other text. `--keep` writes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from _speculating import Machine, bound, say, tasks
from shoal.engine.speculation import profile
from shoal.engine.speculation.drafting import Fixed
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.profile import Threshold
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic

from _common import benchmark, emit

GAMMA = 5
RULES = ("margin", "semantic")
RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Strictest first."""

DIFFERENCES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.4, 1.6, 1.9, 2.3, 3.0)
LOGIT_RATIOS = (0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.9, 0.85)
TAUS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
GRIDS = {"ratio": RATIOS, "difference": DIFFERENCES, "logits": LOGIT_RATIOS}


def calibrated(
    machine: Machine,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    grid: Sequence[float],
    make: Callable[[float], Rule],
    most: float,
    deadline: float,
) -> tuple[Threshold | None, list[dict[str, Any]]]:
    """The laxest value of the grid that holds, and all that was tried."""
    rows: list[dict[str, Any]] = []
    best: Threshold | None = None
    low, high = 0, len(grid)
    while low < high and time.monotonic() < deadline:
        middle = (low + high) // 2
        rule = make(grid[middle])
        wrong = total = passes = decoded_tokens = 0
        logprob = 0.0
        for prompt in prompts:
            found = machine.decode([prompt], tokens, rule, Fixed(GAMMA), trained=True)
            one_wrong, one_total = machine.foreign([prompt], found.completions)
            wrong, total = wrong + one_wrong, total + one_total
            passes, decoded_tokens = passes + found.passes, decoded_tokens + found.tokens
            logprob += sum(found.completions[0].logprobs)
        holds = bound(wrong, total) <= most
        row = {"rule": rule.name, "value": grid[middle], "loss": wrong / max(1, total), "bound": bound(wrong, total)}
        row |= {"tokens": total, "tokens_per_round": decoded_tokens / max(1, passes), "holds": holds}
        rows.append(row | {"logprob_per_token": logprob / max(1, total)})
        say(str(rows[-1]))
        if holds:
            best = Threshold(
                value=grid[middle], loss=wrong / total, loss_bound=bound(wrong, total), tokens=total, drafter=""
            )
            low = middle + 1
        else:
            high = middle
    return best, rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="shoal bench calibrate")
    parser.add_argument("--only", nargs="+", choices=RULES, default=list(RULES), help="rules; all by default")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--draft", type=Path, required=True, help="a head, or a smaller model with the same tokenizer")
    parser.add_argument("--loss", type=float, default=0.02, help="largest share of tokens that are not the model's own")
    parser.add_argument("--form", choices=GRIDS, default="ratio", help="what margin compares with theta")
    parser.add_argument("--prompts", type=int, default=8, help="of each task")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--budget-s", type=float, default=1200.0, help="no further threshold is tried after this")
    parser.add_argument("--keep", action="store_true", help="measure only, and leave the model's profile as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine(options.model, options.draft)
    prompts = [machine.prompt(text) for texts in tasks(options.prompts).values() for text in texts]
    known = profile.load(machine.local.directory)
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for number, name in enumerate(options.only, 1):
        deadline = time.monotonic() + options.budget_s * number / len(options.only)
        grid = GRIDS[options.form] if name == "margin" else TAUS

        def make(value: float, name: str = name) -> Rule:
            return Margin(value, options.form) if name == "margin" else Semantic(value)

        found, tried = calibrated(machine, prompts, options.tokens, grid, make, options.loss, deadline)
        rows += tried
        if found is None:
            say(f"{name}: no threshold of the grid keeps a loss of {options.loss:g}")
            continue
        form = options.form if name == "margin" else ""
        found = msgspec.structs.replace(found, drafter=str(options.draft)[-512:], form=form)
        known = msgspec.structs.replace(known, **{name: found})
        held = next(row for row in tried if row["value"] == found.value)
        headline |= {f"{name}_threshold": found.value, f"{name}_loss": found.loss}
        headline[f"{name}_tokens_per_round"] = held["tokens_per_round"]
    if not options.keep and headline:
        say(f"written: {profile.save(machine.local.directory, known)}")
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
