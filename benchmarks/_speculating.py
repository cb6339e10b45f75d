"""What the benchmarks of speculative decoding share: prompts, a model that decodes with any drafter and rule, and what
its completions are worth to the model alone."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.engine.batching import Batcher
from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.sequence import Sequence as Running
from shoal.engine.source import LocalModel, resolve
from shoal.engine.speculation.drafters import Drafters
from shoal.engine.speculation.drafting import Drafting, Gammas
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.speculating import Round, Speculation
from shoal.engine.tokenizer import Tokenizer
from shoal.fabric.identity import data_dir
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.rollout.host import model_cache

CONTEXT_TOKENS = 1024
Z_95 = 1.645
"""One-sided."""

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


def tasks(count: int) -> dict[str, list[str]]:
    """Prompts by task: copy-like, open questions, and the data sets that are there."""
    found = {"copy": [f"Repeat this text exactly, twice:\n\n{p}" for p in PASSAGES], "chat": list(QUESTIONS)}
    data = Path(os.environ.get("SHOAL_DATA", "/nonexistent"))
    for name, file, key in (("gsm8k", "test.jsonl", "question"), ("humaneval", "HumanEval.jsonl", "prompt")):
        path = data / name / file
        if path.is_file():
            found[name] = [json.loads(line)[key] for line in path.read_text().splitlines()[:count]]
    return {name: texts[:count] for name, texts in found.items()}


@dataclass(frozen=True)
class Decoded:
    """Completions that were decoded together."""

    completions: list[Completion]
    rounds: list[Round]
    """Of one sequence: every pass after the prompt's. Plain steps of the batcher are not among them."""
    seconds: float
    """Of decoding alone, from when every first token is there."""
    passes: int
    tokens: int
    """Of decoding alone, too."""


class Machine:
    """A model, and drafters for it.

    Args:
        draft: a head or a smaller model; absent: look-up.
    """

    def __init__(self, model: str, draft: Path | None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.local: LocalModel = resolve(model, model_cache(), say)
        self.tokenizer = Tokenizer(self.local.directory)
        cpu = torch.device("cpu")
        self.target = Decoder(self.local.config(), dtype, cpu)
        self.target.load(self.local.tensors())
        self._draft = resolve(str(draft), model_cache(), say) if draft else None
        self._drafters: dict[tuple[bool, int], Drafters] = {}

    def drafters(self, *, trained: bool, tree_width: int = 1) -> Drafters:
        """The trained drafter's, or look-up's."""
        key = trained, tree_width
        if key not in self._drafters:
            draft = self._draft if trained else None
            found = Drafters(draft, self.local, self.target.dtype, self.target.device, tree_width=tree_width)
            self._drafters[key] = found
        return self._drafters[key]

    def prompt(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.prompt([Message(role="user", content=text)]))

    def cache(self, slots: int, tokens: int) -> KVCache:
        arch = self.target.arch
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * self.target.dtype.itemsize
        sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, slots, tokens * token_bytes
        return KVCache(*sizes, self.target.dtype, self.target.device)

    def decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        tokens: int,
        rule: Rule,
        gammas: Gammas | None,
        *,
        trained: bool = False,
        tree_width: int = 1,
        temperature: float = 0.0,
        endless: bool = False,
    ) -> Decoded:
        """All prompts together, greedily or sampled; without `gammas` plainly, by a batcher that knows no drafts."""
        slots = len(prompts)
        rounds: list[Round] = []
        speculation = None
        if gammas is not None:
            drafter = self.drafters(trained=trained, tree_width=tree_width).make(slots, slots * CONTEXT_TOKENS)
            drafting = Drafting(drafter, gammas, tree_width=tree_width, seeded=True)
            speculation = Speculation(drafting, rule, on_round=rounds.append)
        tokenizer = self.tokenizer
        if endless:
            tokenizer = Tokenizer(self.local.directory)
            tokenizer.end_ids = frozenset()
        cache = self.cache(slots, slots * CONTEXT_TOKENS)
        batcher = Batcher(self.target, tokenizer, cache, CONTEXT_TOKENS, speculation=speculation)
        done: dict[int, Completion] = {}
        keep = done.__setitem__
        for number, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=number)
            batcher.waiting.append(Running(SampleRequest(prompt, params), lambda one, n=number: keep(n, one)))
        while batcher.waiting or batcher.num_filling:
            batcher.step()
        began, passes, before = time.perf_counter(), 0, batcher.tokens_drawn
        while batcher.step():
            passes += 1
        seconds = time.perf_counter() - began
        tokens_drawn = batcher.tokens_drawn - before
        return Decoded([done[number] for number in range(slots)], rounds, seconds, passes, tokens_drawn)

    @torch.inference_mode()
    def foreign(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]) -> tuple[int, int]:
        """Tokens that are not the model's likeliest where they stand, and all tokens; near-ties count as its own."""
        wrong = total = 0
        for prompt, one in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *one.token_ids]])
            cache = self.cache(1, CONTEXT_TOKENS)
            cache.reserve(1, ids.shape[1], 0)
            hidden = self.target.forward(ids, torch.zeros(1, dtype=torch.int64), cache)[0, len(prompt) - 1 : -1]
            logits = self.target.logits(hidden).float()
            own = logits.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            wrong += int((logits.amax(dim=-1) - own > NEAR_TIE).sum())
            total += len(one.token_ids)
        return wrong, total


NEAR_TIE = 0.07
"""Of logits near 16, which bf16 tells apart in steps of 1 / 16."""


def bound(wrong: int, total: int) -> float:
    """Upper end of a share's one-sided 95 % interval (Wilson's)."""
    if not total:
        return 1.0
    share, z2 = wrong / total, Z_95**2
    middle = share + z2 / (2 * total)
    return (middle + Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)


class Records:
    """Results that a benchmark which was interrupted need not measure again: one JSON line each, by key."""

    def __init__(self, name: str, fresh: bool) -> None:
        folder = data_dir() / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        if fresh:
            self.path.unlink(missing_ok=True)
        self._known: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                found = json.loads(line)
                self._known[found["key"]] = found["row"]

    def get(self, **key: Any) -> dict[str, Any] | None:
        return self._known.get(_text(key))

    def put(self, row: dict[str, Any], **key: Any) -> None:
        self._known[_text(key)] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"key": _text(key), "row": row}) + "\n")


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
