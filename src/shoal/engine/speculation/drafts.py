"""What a drafter proposes: for each row a tree of tokens behind the last one that is certain, of its own size.

A chain is a tree in which every node has one child. Nodes stand in rows of equal width, padded at the end; parents
come before their children, and among siblings the one to be tried first comes first.

Invariants: node i's parent is below i, or `ROOT`, the row's last certain token; padding (parent `PADDING`) comes after
the row's nodes only.

Shapes: B rows, N nodes of the widest row, V vocabulary, T = N + 1 tokens of the verifying pass (the root is the first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1
PADDING = -2


@dataclass(frozen=True)
class Drafts:
    """Proposals of one round.

    Args:
        tokens_BN: token ids, int64.
        parents_BN: index of each node's parent, `ROOT` or `PADDING`, int64.
        probs_BNV: the drafter's own distribution where it chose each token; absent for drafters that have none.
        drawn: whether the tokens were drawn from `probs_BNV`, independently given their parents. Otherwise they are
            a deterministic choice, and the distribution they came from is a point.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    probs_BNV: Tensor | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        assert self.tokens_BN.shape == self.parents_BN.shape and self.tokens_BN.ndim == 2
        assert self.probs_BNV is not None or not self.drawn

    @staticmethod
    def chains(rows: Sequence[Sequence[int]], probs_BNV: Tensor | None = None, *, drawn: bool = False) -> Drafts:
        """One chain a row, of any length."""
        parents = [range(ROOT, len(row) - 1) for row in rows]
        return Drafts.trees(rows, parents, probs_BNV, drawn=drawn)

    @staticmethod
    def trees(
        rows: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        probs_BNV: Tensor | None = None,
        *,
        drawn: bool = False,
    ) -> Drafts:
        """One tree a row."""
        width = max((len(row) for row in rows), default=0)
        tokens_BN = torch.zeros(len(rows), width, dtype=torch.int64)
        parents_BN = torch.full((len(rows), width), PADDING, dtype=torch.int64)
        for number, (row, above) in enumerate(zip(rows, parents, strict=True)):
            assert all(ROOT <= parent < node for node, parent in enumerate(above)), "a parent comes before its child"
            tokens_BN[number, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
            parents_BN[number, : len(row)] = torch.tensor(list(above), dtype=torch.int64)
        return Drafts(tokens_BN, parents_BN, probs_BNV, drawn)

    @staticmethod
    def combs(spines_BG: Tensor, others_BGK: Tensor, lengths: Sequence[int], probs_BGV: Tensor | None) -> Drafts:
        """A chain a row with alternatives beside each of its tokens, which go no further: where the chain fails, one
        of them may be right.

        Args:
            spines_BG: the chains.
            others_BGK: the alternatives, best first.
            lengths: of each row's chain.
            probs_BGV: the drafter's distributions along the chains.
        """
        rows, parents, sources = [], [], []
        for row, length in enumerate(lengths):
            tokens: list[int] = []
            above: list[int] = []
            source: list[int] = []
            parent = ROOT
            for depth in range(length):
                spine = len(tokens)
                siblings = [int(spines_BG[row, depth]), *others_BGK[row, depth].tolist()]
                tokens += siblings
                above += [parent] * len(siblings)
                source += [depth] * len(siblings)
                parent = spine
            rows.append(tokens)
            parents.append(above)
            sources.append(source)
        if probs_BGV is None:
            return Drafts.trees(rows, parents)
        width = max((len(row) for row in rows), default=0)
        index_BN = torch.tensor([source + [0] * (width - len(source)) for source in sources], device=probs_BGV.device)
        index_BNV = index_BN.view(len(rows), width, 1).expand(-1, -1, probs_BGV.shape[-1])
        return Drafts.trees(rows, parents, probs_BGV.gather(1, index_BNV) if width else probs_BGV[:, :0])

    @property
    def width(self) -> int:
        """N."""
        return self.tokens_BN.shape[1]

    @property
    def sizes(self) -> list[int]:
        """Nodes of each row."""
        found: list[int] = (self.parents_BN != PADDING).sum(dim=1).tolist()
        return found

    @property
    def depths(self) -> list[int]:
        """Of each row's deepest node."""
        found: list[int] = (self.ancestors_BTT().sum(dim=-1).amax(dim=-1) - 1).tolist()
        return found

    def select(self, rows: Sequence[int]) -> Drafts:
        """These rows only."""
        if list(rows) == list(range(len(self.tokens_BN))):
            return self
        index = list(rows)
        probs = None if self.probs_BNV is None else self.probs_BNV[index]
        return Drafts(self.tokens_BN[index], self.parents_BN[index], probs, self.drawn)

    def behind(self, counts: Sequence[int]) -> Drafts:
        """Chains without each row's first `counts` tokens."""
        assert self.are_chains
        rows = [
            tokens[count:size] for tokens, count, size in zip(self.tokens_BN.tolist(), counts, self.sizes, strict=True)
        ]
        probs = self.probs_BNV
        if probs is not None:
            width = max(map(len, rows))
            probs = torch.nn.utils.rnn.pad_sequence(
                [p_NV[count : count + width] for p_NV, count in zip(probs, counts, strict=True)], batch_first=True
            )
        return Drafts.chains(rows, probs, drawn=self.drawn)

    @property
    def are_chains(self) -> bool:
        chain_N = torch.arange(self.width, device=self.parents_BN.device) - 1
        return bool(((self.parents_BN == chain_N) | (self.parents_BN == PADDING)).all())

    def ancestors_BTT(self) -> Tensor:
        """Which tokens of the verifying pass each one sees: the root, its ancestors, itself."""
        return ancestors(self.parents_BN)


def ancestors(parents_BN: Tensor) -> Tensor:
    """Of trees given by each node's parent, which of root and nodes each one sees, [B, T, T]."""
    batch, width = parents_BN.shape
    seen_BTT = torch.eye(width + 1, dtype=torch.bool, device=parents_BN.device).repeat(batch, 1, 1)
    rows_B = torch.arange(batch, device=parents_BN.device)
    for node in range(width):
        parent_B = (parents_BN[:, node] + 1).clamp(min=0)
        seen_BTT[:, node + 1] |= seen_BTT[rows_B, parent_B] & (parents_BN[:, node, None] != PADDING)
    return seen_BTT
