"""What a worker's tokens should have been: claimed episodes put through the policy version that they name.

    Claim ──▶ text, prompt, ends (by the tokenizer) ──▶ one Row a turn ──▶ one pass a version ──▶ Finding

1. A replay is *teacher-forced*. The claimed tokens go through the claimed version in one pass, and at each of them the
   random number that the leased seed gives is looked up in the distribution that comes out. Drawing again token by
   token would give the same tokens exactly where every lookup hits its token, would cost a decode instead of a prefill,
   and would say nothing about what follows the first near-tie that rounding decides otherwise.
2. It is computed with the engine's own forward pass (`engine/model`), not the trainer's: a second body with weights of
   its own can be any version, and rounds as workers on the same kind of machine do. Temperature and grammar masks are
   the sampler's and the trainer's.
3. A turn whose weights were swapped on the way is computed as the worker had to: with the old version up to the swap,
   then on the same cache (`keep`), or from the start again (`recompute`), with the new one.

Invariants: nothing here changes the trainer's weights, or random state; no pass is larger than `pass_tokens` unless one
turn alone is; a claim that cannot be computed ends as a finding that says so, never as an exception.

Shapes: R rows, T new positions, N drawn tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from shoal.broadcast.tensors import TensorView
from shoal.engine.cache import KVCache
from shoal.engine.grammar import Grammars
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import from_views
from shoal.errors import ModelError, StorageError
from shoal.protocol.chat import Message
from shoal.protocol.episode import MAX_TURNS, Turn
from shoal.protocol.sampling import SwapPolicy
from shoal.protocol.trust import Claim, Finding
from shoal.rollout.session import SEED_STRIDE

PASS_TOKENS = 4096
"""Padded positions computed at once."""

PIECE = 512
"""Longer rows are computed in pieces of so many positions, which bounds the attention's memory."""

CHUNK = 128
"""Drawn tokens whose fp32 probabilities exist at once."""

FORBIDDEN = float("-inf")

WORST = 1e3
"""Nats beyond which one token's difference or surprise counts no further."""

SUMS = ("difference", "displacement", "surprise", "variance")
"""What is added up over a turn's tokens, by the finding's names."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(eq=False)
class Row:
    """One turn: the sequence that its request was, and what it is claimed to have drawn."""

    claim: Claim
    turn: Turn
    ids: tuple[int, ...]
    """Prompt and drawn tokens."""
    prompt: int
    uniforms: list[float]
    """What the leased seed gives for each drawn token; none where that is not known."""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    @property
    def versions(self) -> tuple[int, ...]:
        """Distinct versions, in order."""
        return tuple(dict.fromkeys(self.turn.completion.versions))

    def end(self, version: int) -> int:
        """How many positions were computed under this version or an older one.

        The token drawn k-th was drawn from position prompt + k − 1, under its own version; the prompt's positions were
        computed under the first one's. The last token drawn was never put in.
        """
        older = sum(v <= version for v in self.turn.completion.versions)
        return self.prompt + older - 1

    def numbers(self, version: int) -> list[int]:
        """Which of the drawn tokens are this version's."""
        return [k for k, v in enumerate(self.turn.completion.versions) if v == version]


class ClaimChecker:
    """Computes findings; used by one thread at a time.

    Args:
        model: architecture and tokenizer.
        dtype: the number format that workers hold weights in.
        read: tensors of a version; raises `StorageError` where it is not kept.
        on_swap: what workers do with completions under way when weights change.
        seeds: whether tokens must be those that the leased seeds draw.
    """

    def __init__(
        self,
        model: LocalModel,
        tokenizer: Tokenizer,
        read: Callable[[int], Mapping[str, TensorView]],
        *,
        dtype: str,
        device: torch.device,
        context_tokens: int,
        on_swap: SwapPolicy = "keep",
        pass_tokens: int = PASS_TOKENS,
        seeds: bool = True,
    ) -> None:
        self._model = Decoder(model.config(), DTYPES[dtype], device)
        self._tokenizer = tokenizer
        self._read = read
        self._on_swap = on_swap
        self._context_tokens = context_tokens
        self._pass_tokens = pass_tokens
        self._seeds = seeds
        self._version = -1

    def check(self, claims: Sequence[Claim]) -> list[Finding]:
        """One finding a claim, in their order."""
        started = time.perf_counter()
        found: dict[str, Finding] = {}
        rows: list[Row] = []
        prompts: dict[tuple[Message, ...], list[int]] = {}
        for claim in claims:
            name = claim.episode.id
            problem = self._problem(claim, prompts)
            if problem:
                found[name] = Finding(episode=name, problem=problem, tokens=claim.episode.num_tokens)
            else:
                rows += rows_of(claim, seeds=self._seeds)
        gone = self._compute(rows)
        took = time.perf_counter() - started
        total = max(1, sum(claim.episode.num_tokens for claim in claims))
        for claim in claims:
            name = claim.episode.id
            if name not in found:
                own = [row for row in rows if row.claim is claim]
                found[name] = _finding(claim, own, gone=any(row in gone for row in own))
        return [replace(found[claim.episode.id], seconds=took * claim.episode.num_tokens / total) for claim in claims]

    # What needs no weights

    def _problem(self, claim: Claim, prompts: dict[tuple[Message, ...], list[int]]) -> str:
        """What cannot be so, whatever the weights, or an empty string.

        Args:
            prompts: openings that were rendered before, and what they gave.
        """
        episode, tokenizer = claim.episode, self._tokenizer
        vocab_size = self._model.arch.vocab_size
        if any(max(*t.context_ids, *t.completion.token_ids, 0) >= vocab_size for t in episode.turns):
            return f"it has token ids beyond the vocabulary of {vocab_size}"
        if any(
            t.grammar is not None and not self._grammars.allows(t.grammar, t.completion.token_ids)
            for t in episode.turns
        ):
            return "a turn's tokens do not match its grammar"
        if not claim.opening:
            return ""  # An agent's own program asked: its prompts and limits are not known here.
        used = 0
        before: tuple[int, ...] = ()
        for number, turn in enumerate(episode.turns):
            drawn = turn.completion.token_ids
            if number:
                expected = tokenizer.continuation(before, turn.observation)
            else:
                if claim.opening not in prompts:
                    prompts[claim.opening] = tokenizer.prompt(claim.opening)
                expected = prompts[claim.opening]
            if list(turn.context_ids) != expected:
                return "a turn's context is not what its environment said"
            if turn.completion.text != tokenizer.visible(drawn, claim.stop):
                return "a turn's text is not what its tokens say"
            if any(token in tokenizer.end_ids for token in drawn[:-1]):
                return "a turn goes on after its end"
            if turn.completion.finish == "stop" and not self._ends(claim, turn):
                return "a turn says that it was over, and nothing in it ends it"
            used += len(turn.context_ids) + len(drawn)
            before = drawn
        if claim.unfinished is not None and len(episode.turns) < MAX_TURNS:
            after = tokenizer.continuation(before, claim.unfinished)
            if used + len(after) < self._context_tokens:
                return "it ends although its environment goes on and there is room"
        return ""

    def _ends(self, claim: Claim, turn: Turn) -> bool:
        drawn = turn.completion.token_ids
        if drawn[-1] in self._tokenizer.end_ids or self._tokenizer.ends_with_stop(drawn, claim.stop):
            return True
        if turn.grammar is None:
            return False
        constraint = self._grammars.constraint(turn.grammar)
        return constraint.took_all(drawn) and constraint.is_complete

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._tokenizer.hf, self._tokenizer.end_ids)

    # What does

    def _compute(self, rows: Sequence[Row]) -> set[Row]:
        """Fill in the rows' sums; gives those that name a version that is not kept."""
        gone: set[Row] = set()
        order = sorted(rows, key=lambda row: (row.versions, len(row.ids)))
        for batch in self._batches(order):
            try:
                self._compute_batch(batch)
            except (StorageError, ModelError):
                gone.update(batch)  # Pruned meanwhile, or damaged: no worker's fault.
        return gone

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows of the same versions, as many as a pass holds."""
        batch: list[Row] = []
        for row in rows:
            full = (len(batch) + 1) * len(row.ids) > self._pass_tokens
            if batch and (full or row.versions != batch[0].versions):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _compute_batch(self, rows: list[Row]) -> None:
        arch, model = self._model.arch, self._model
        longest = max(len(row.ids) for row in rows)
        cache = KVCache(
            arch.num_layers, arch.num_kv_heads, arch.head_dim, len(rows), 1 << 62, model.dtype, model.device
        )
        cache.reserve(len(rows), longest + PIECE, 0)
        done = [0] * len(rows)
        for version in rows[0].versions:
            self._become(version)
            first = [0] * len(rows) if self._on_swap == "recompute" else done
            ends = [row.end(version) for row in rows]
            hidden = self._forward(rows, first, ends, cache)
            picked = [row.numbers(version) for row in rows]
            states = [
                h[[row.prompt + k - 1 - f for k in n]] for row, h, f, n in zip(rows, hidden, first, picked, strict=True)
            ]
            self._measure(
                [(row, k) for row, numbers in zip(rows, picked, strict=True) for k in numbers], torch.cat(states)
            )
            done = ends

    def _become(self, version: int) -> None:
        if version != self._version:
            self._version = -1
            self._model.load(from_views(self._read(version)))
            self._version = version

    def _forward(self, rows: Sequence[Row], first: Sequence[int], ends: Sequence[int], cache: KVCache) -> list[Tensor]:
        """Hidden states of each row's positions first … end − 1."""
        device = self._model.device
        found: list[list[Tensor]] = [[] for _ in rows]
        most = max(end - start for start, end in zip(first, ends, strict=True))
        for at in range(0, most, PIECE):
            width = min(PIECE, most - at)
            pieces = [
                row.ids[start + at : min(start + at + width, end)]
                for row, start, end in zip(rows, first, ends, strict=True)
            ]
            ids = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces], device=device)
            # A row that is through writes its padding behind its end, where nothing is read.
            starts = torch.tensor([min(start + at, end) for start, end in zip(first, ends, strict=True)], device=device)
            hidden = self._model.forward(ids, starts, cache)
            for states, piece, out in zip(hidden, pieces, found, strict=True):
                out.append(states[: len(piece)])
        return [torch.cat(states) for states in found]

    def _measure(self, drawn: Sequence[tuple[Row, int]], hidden_NH: Tensor) -> None:
        """Add what drawn tokens, each with the state that it was drawn from, say to their rows."""
        vocab_size, device = self._model.arch.vocab_size, hidden_NH.device
        allowed = self._allowed({row: None for row, _ in drawn})
        for first in range(0, len(drawn), CHUNK):
            part = drawn[first : first + CHUNK]
            logits_NV = self._model.logits(hidden_NH[first : first + CHUNK]).float()
            logits_NV /= torch.tensor([[row.claim.episode.temperature] for row, _ in part], device=device)
            for at, (row, k) in enumerate(part):
                if row in allowed:
                    bits = np.unpackbits(allowed[row][k], bitorder="little")[:vocab_size].astype(np.bool_)
                    logits_NV[at].masked_fill_(~torch.from_numpy(bits).to(device), FORBIDDEN)
            _add(part, logits_NV)

    def _allowed(self, rows: Iterable[Row]) -> dict[Row, NDArray[np.uint8]]:
        """Which tokens could be drawn for each token of the rows that a grammar bound, packed."""
        vocab_size = self._model.arch.vocab_size
        return {
            row: self._grammars.masks(row.turn.grammar, row.turn.completion.token_ids, vocab_size)
            for row in rows
            if row.turn.grammar is not None
        }


def _add(drawn: Sequence[tuple[Row, int]], logits_NV: Tensor) -> None:
    """One chunk's log-probabilities, surprises and replays."""
    device = logits_NV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    completions = [(row.turn.completion, k) for row, k in drawn]
    drawn_N1 = torch.tensor([[completion.token_ids[k]] for completion, k in completions], device=device)
    claimed_N = column([completion.logprobs[k] for completion, k in completions])
    uniform_N = column([row.uniforms[k] if row.uniforms else math.nan for row, k in drawn])
    logs_NV = torch.log_softmax(logits_NV, dim=-1)
    probs_NV = logs_NV.exp()
    chosen_N = logs_NV.gather(1, drawn_N1)[:, 0].double()
    finite_NV = logs_NV.masked_fill(probs_NV == 0, 0.0)
    mean_N = (probs_NV * finite_NV).sum(dim=1, dtype=torch.float64)  # −entropy
    square_N = (probs_NV * finite_NV.square()).sum(dim=1, dtype=torch.float64)
    tokens_V = torch.arange(logits_NV.shape[1], device=device)
    low_N = probs_NV.masked_fill(tokens_V >= drawn_N1, 0.0).sum(dim=1, dtype=torch.float64)
    high_N = low_N + probs_NV.gather(1, drawn_N1)[:, 0].double()
    found = {
        "difference": (claimed_N - chosen_N).abs().clamp(max=WORST),
        "displacement": torch.maximum(low_N - uniform_N, uniform_N - high_N).clamp(min=0).nan_to_num(0.0),
        "surprise": (chosen_N - mean_N).clamp(min=-WORST),
        "variance": (square_N - mean_N.square()).clamp(min=0),
    }
    broken = torch.isnan(chosen_N).tolist()
    for name, values in found.items():
        for (row, _), value, bad in zip(drawn, values.tolist(), broken, strict=True):
            row.sums[name] += math.nan if bad else value


def rows_of(claim: Claim, *, seeds: bool = True) -> list[Row]:
    """A claim's turns as the requests that they were; without `seeds` nothing is said of what these would draw."""
    episode = claim.episode
    sequences: list[tuple[int, ...]] = []
    rows = []
    for number, (turn, parent) in enumerate(zip(episode.turns, episode.parents, strict=True)):
        prompt = (sequences[parent] if parent >= 0 else ()) + turn.context_ids
        sequences.append(prompt + turn.completion.token_ids)
        if turn.given:
            continue  # Nobody claims to have drawn it.
        # Where an agent's program asks, calls that came to nothing used up seeds: which turn had which is not known.
        seeded = seeds and bool(claim.opening)
        draws = random.Random((claim.seed + SEED_STRIDE * number) % 2**63) if seeded else None
        uniforms = [draws.random() for _ in turn.completion.token_ids] if draws is not None else []
        rows.append(Row(claim, turn, sequences[-1], len(prompt), uniforms))
    return rows


def _finding(claim: Claim, rows: Sequence[Row], *, gone: bool) -> Finding:
    name, tokens = claim.episode.id, sum(len(row.turn.completion.token_ids) for row in rows)
    if gone:
        return Finding(episode=name, gone=True)
    if not tokens:
        return Finding(episode=name)  # all of it was given: nobody claims to have drawn anything
    sums = {key: math.fsum(row.sums[key] for row in rows) for key in SUMS}
    if not all(map(math.isfinite, sums.values())):
        return Finding(episode=name, problem="its tokens have no probability", tokens=tokens)
    return Finding(
        episode=name,
        tokens=tokens,
        difference=sums["difference"] / tokens,
        displacement=sums["displacement"] / tokens,
        surprise=sums["surprise"],
        variance=sums["variance"],
    )
