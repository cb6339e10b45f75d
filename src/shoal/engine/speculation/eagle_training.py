"""Teaching an EAGLE-3 head to say what its target would say, from text that the target itself wrote.

Only token ids are kept on disk (`writing.TargetText`). What the head reads and what it should say are computed again
for each batch by one pass of the target over it: features of 0.5 M tokens would take gigabytes, and are bounded so by
one batch.

*Training-time test* (EAGLE-3, section 3.2): after the first, each step takes the head's own outputs for features, as in
drafting. In step j, position t reads its own output of step j − 1 beside the embedding of x_{t+1+j}, and is to say what
the target says after x_{t+1+j}. It sees the first step's keys up to t, and of every later step its own position only:

    loss = Σ_j 0.8^j · mean over positions of −Σ_r p(r) log q_j(r)

where p is the target's distribution, renormalised over the reduced vocabulary, and positions count whose likeliest
token that vocabulary has (the others can't be learnt).

Accept rates are measured greedily: by depth, how often head and target have the same likeliest token, given that they
had at all depths before and that the text went the same way.

Shapes: B texts, T positions, J steps, R reduced and V whole vocabulary, H the head's size, F features.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.speculation.eagle import EagleHead
from shoal.engine.speculation.writing import TargetText
from shoal.errors import RunError

STEP_DECAY = 0.8
"""Weight of a step's loss against the one before, as EAGLE-3 is trained."""


@dataclass(frozen=True)
class Lesson:
    """One batch as the target sees it."""

    ids_BT: Tensor
    features_BTF: Tensor
    p_BTR: Tensor
    """The target's distribution after each position, renormalised over the reduced vocabulary."""
    best_BT: Tensor
    """Its likeliest token there, of the whole vocabulary."""
    counts_BT: Tensor
    """Whether a prediction of what follows this position is asked for: it lies in the completion."""


@dataclass(frozen=True)
class Score:
    """Sums over positions, by step; they add up over batches."""

    right_J: Tensor
    """Chains that were right up to and with this step."""
    asked_J: Tensor
    """Chains that were right up to this step."""

    def __add__(self, other: Score) -> Score:
        return Score(self.right_J + other.right_J, self.asked_J + other.asked_J)

    @property
    def accept(self) -> list[float]:
        """α by depth."""
        found: list[float] = (self.right_J / self.asked_J.clamp(min=1)).tolist()
        return found


def frequent_ids(texts: Sequence[TargetText], size: int, vocab_size: int) -> Tensor:
    """The tokens that the target says most often, ascending, [size]; filled up with the lowest ids."""
    counts = Counter(token for text in texts for token in text.token_ids)
    chosen = [token for token, _ in counts.most_common(size)]
    known = set(chosen)
    chosen += [token for token in range(vocab_size) if token not in known][: size - len(chosen)]
    return torch.tensor(sorted(chosen))


class Teacher:
    """A target that says what its texts looked like from inside.

    Args:
        depths: layers whose incoming hidden states the head reads.
        ids_R: the reduced vocabulary.
    """

    def __init__(self, target: Decoder, depths: tuple[int, ...], ids_R: Tensor) -> None:
        self._target, self._depths = target, depths
        self._ids_R = ids_R.to(target.device)

    def lesson(self, texts: Sequence[TargetText]) -> Lesson:
        """One pass over a batch of texts."""
        arch, device = self._target.arch, self._target.device
        lengths = [len(text.prompt_ids) + len(text.token_ids) for text in texts]
        longest = max(lengths)
        rows = [[*text.prompt_ids, *text.token_ids] for text in texts]
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * self._target.dtype.itemsize
        budget = len(texts) * (longest + 64) * token_bytes
        sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, len(texts), budget
        cache = KVCache(*sizes, self._target.dtype, device)
        cache.reserve(len(texts), longest, 0)
        seen: dict[int, Tensor] = {}

        def observe(layer: int, hidden_BTH: Tensor) -> None:
            if layer in self._depths:
                seen[layer] = hidden_BTH

        start_B = torch.zeros(len(texts), dtype=torch.int64, device=device)
        hidden = self._target.forward(ids_BT, start_B, cache, observe=observe)
        best, p = [], []
        for row in hidden:
            logits_TV = self._target.logits(row).float()
            best.append(logits_TV.argmax(dim=-1))
            p.append(torch.softmax(logits_TV[:, self._ids_R], dim=-1))
        at_T = torch.arange(longest, device=device)
        prompts_B1 = torch.tensor([[len(text.prompt_ids)] for text in texts], device=device)
        counts_BT = (at_T >= prompts_B1 - 1) & (at_T < torch.tensor(lengths, device=device)[:, None])
        features_BTF = torch.cat([seen[depth] for depth in self._depths], dim=-1)
        # What inference mode made cannot be differentiated through; copies can.
        return Lesson(ids_BT, features_BTF.clone(), torch.stack(p).clone(), torch.stack(best), counts_BT)


def unroll(head: EagleHead, embedding_VH: Tensor, lesson: Lesson, num_steps: int) -> tuple[Tensor, Score]:
    """The training-time test over a batch: loss (a scalar to differentiate) and how often chains were right.

    Raises:
        RunError: nothing in the batch can be learnt: no completion, or none of its tokens in the reduced vocabulary.
    """
    device = lesson.ids_BT.device
    batch, length = lesson.ids_BT.shape
    attention = _Unrolled(length, device)
    at_BT = torch.arange(length, device=device).expand(batch, -1)
    ids_R = head.ids_R
    # The optimizer keeps fp32 masters; where the head itself is bf16, its passes are faster by as much as bf16 is here.
    dtype = head.fc.weight.dtype
    g = head.fc(lesson.features_BTF.to(dtype))
    alive_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
    losses, right, asked = [], [], []
    for step in range(num_steps):
        # Index t speaks about what follows position t + 1 + step; past the end nothing is asked.
        next_BT, counts_BT = _shifted(lesson.ids_BT, 1 + step), _shifted(lesson.counts_BT, 1 + step)
        best_BT, p_BTR = _shifted(lesson.best_BT, 1 + step), _shifted(lesson.p_BTR, 1 + step)
        g = head.step(g, F.embedding(next_BT, embedding_VH).to(dtype), at_BT + step, attention)
        log_q_BTR = torch.log_softmax(head.logits(g).float(), dim=-1)
        learnt_BT = counts_BT & head.t2d[best_BT]
        if not bool(learnt_BT.any()) and step == 0:
            raise RunError("a batch has no token that the head could learn.", "Generate longer texts, or more of them.")
        cross_BT = -(p_BTR * log_q_BTR).sum(dim=-1)
        losses.append(STEP_DECAY**step * (cross_BT * learnt_BT).sum() / learnt_BT.sum().clamp(min=1))
        alive_BT = alive_BT & counts_BT
        match_BT = alive_BT & (ids_R[log_q_BTR.argmax(dim=-1)] == best_BT)
        asked.append(alive_BT.sum())
        right.append(match_BT.sum())
        # The next step is only asked what it would be in drafting: the text has to have gone where the draft went.
        alive_BT = match_BT & (_shifted(lesson.ids_BT, 2 + step) == best_BT)
    return torch.stack(losses).sum(), Score(torch.stack(right).double(), torch.stack(asked).double())


def _shifted(x: Tensor, by: int) -> Tensor:
    """x[:, t + by], zero behind the end."""
    found = torch.zeros_like(x)
    if by < x.shape[1]:
        found[:, :-by] = x[:, by:]
    return found


class _Unrolled:
    """Attention of the training-time test: the first step's keys causally, of later steps the own position."""

    def __init__(self, length: int, device: torch.device) -> None:
        self._future_TT = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        self._keys.append(k)
        self._values.append(v)
        scale = q.shape[-1] ** -0.5
        first = (q @ self._keys[0].transpose(-1, -2)).masked_fill(self._future_TT, float("-inf"))
        own = [(q * keys).sum(dim=-1, keepdim=True) for keys in self._keys[1:]]
        scores = torch.cat((first, *own), dim=-1).float() * scale
        weights = torch.softmax(scores, dim=-1).to(v.dtype)
        mixed = weights[..., : first.shape[-1]] @ self._values[0]
        for step, values in enumerate(self._values[1:]):
            mixed = mixed + weights[..., first.shape[-1] + step, None] * values
        return mixed.transpose(1, 2).flatten(2)


class Optimizer(Protocol):
    """What moves the head's weights; it is handed in, since optimizers live in a higher room."""

    def accumulate(self) -> None: ...

    def step(self, lr: float) -> object: ...


@dataclass(frozen=True)
class Plan:
    """One training.

    Args:
        batch_size: texts of a step.
        microbatch: texts of one pass.
        rate: learning rate by step.
    """

    num_steps: int
    batch_size: int
    microbatch: int
    test_steps: int
    rate: Callable[[int], float]
    seed: int


@dataclass(frozen=True)
class StepReport:
    """One step: its number (from 1), loss, and accept rates in training."""

    step: int
    loss: float
    accept: tuple[float, ...]
    tokens: int


def train(
    head: EagleHead,
    embedding_VH: Tensor,
    teacher: Teacher,
    texts: Sequence[TargetText],
    plan: Plan,
    optimizer: Optimizer,
    begin: int = 0,
) -> Iterator[StepReport]:
    """Steps `begin` + 1 … `plan.num_steps`; a report after each. A resumed training sees the same batches."""
    for step in range(begin, plan.num_steps):
        chosen = batch_of(len(texts), plan.batch_size, step, plan.seed)
        pieces = [chosen[at : at + plan.microbatch] for at in range(0, len(chosen), plan.microbatch)]
        total, score, tokens = 0.0, None, 0
        for piece in pieces:
            lesson = teacher.lesson([texts[index] for index in piece])
            loss, own = unroll(head, embedding_VH, lesson, plan.test_steps)
            (loss * len(piece) / len(chosen)).backward()
            optimizer.accumulate()
            total += float(loss.detach()) * len(piece) / len(chosen)
            score = own if score is None else score + own
            tokens += int(lesson.counts_BT.sum())
        optimizer.step(plan.rate(step))
        assert score is not None
        yield StepReport(step + 1, total, tuple(score.accept), tokens)


@torch.no_grad()
def evaluate(
    head: EagleHead, embedding_VH: Tensor, teacher: Teacher, texts: Sequence[TargetText], plan: Plan
) -> tuple[float, list[float]]:
    """Mean loss and accept rates by depth over held-out texts."""
    total, score = 0.0, None
    for at in range(0, len(texts), plan.microbatch):
        piece = texts[at : at + plan.microbatch]
        loss, own = unroll(head, embedding_VH, teacher.lesson(piece), plan.test_steps)
        total += float(loss) * len(piece)
        score = own if score is None else score + own
    assert score is not None
    return total / len(texts), score.accept


def batch_of(count: int, size: int, step: int, seed: int) -> list[int]:
    """The texts of one step: epoch after epoch, each in an order of its own; depends on the step alone."""
    found: list[int] = []
    at = step * size
    while len(found) < min(size, count):
        epoch, offset = divmod(at, count)
        order = list(range(count))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        take = order[offset : offset + size - len(found)]
        found += take
        at += len(take)
    return found
