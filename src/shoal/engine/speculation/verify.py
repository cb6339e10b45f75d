"""Walk each row's drafts with the target's answers and a rule: which tokens stay, and the token after them.

All rows are walked together, one level of their trees at a time; the work per level is on the rows still alive.
Pure: the uniform numbers come from the caller, one for each node and one for the last draw, so a seeded row has the
same outcome whatever else is in the batch.

Invariants: every row gets at least one token (the last, from the target's residual); a row's accepted nodes are a path
from its root; a reported log-probability is the target's for that token, which under a lossless rule is the one it was
drawn with.

Shapes: B rows, N nodes, T = N + 1 positions with logits (root first), V vocabulary, M rows alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shoal.engine.speculation.drafts import PADDING, ROOT, Drafts
from shoal.engine.speculation.fly import Fly, forgiven
from shoal.engine.speculation.rules import Positions, Rule, distribution, point
from shoal.protocol.sampling import SamplingParams


@dataclass(frozen=True)
class Verdict:
    """One row's outcome."""

    nodes: tuple[int, ...]
    """Accepted, from the root on."""
    tokens: tuple[int, ...]
    """Their tokens, and the target's own after them."""
    logprobs: tuple[float, ...]
    """One a token, nats, in the distribution the target alone would draw from (greedy: untempered)."""


@torch.inference_mode()
def verify(
    rule: Rule,
    logits_BTV: Tensor,
    drafts: Drafts,
    params: Sequence[SamplingParams],
    uniforms_BT: Tensor,
) -> list[Verdict]:
    """The outcome of every row.

    Args:
        logits_BTV: the target's, after the root and after each node; any floating type.
        uniforms_BT: in [0, 1), fp64: entry i for node i, the last for the row's final draw.
    """
    if isinstance(rule, Fly):
        assert drafts.are_chains, "fly judges chains"
    walk = _Walk(logits_BTV, drafts, params)
    kept = _forgiven(rule, walk, uniforms_BT) if isinstance(rule, Fly) else frozenset()
    children = _children(drafts)
    here = [ROOT] * len(params)
    alive = list(range(len(params)))
    paths: list[list[int]] = [[] for _ in params]
    final: dict[int, Tensor] = {}
    while alive:
        p_MV, soft_MV = walk.target(alive, [here[row] for row in alive])
        moved: set[int] = set()
        offered = [children[row].get(here[row], ()) for row in alive]
        for sibling in range(max(map(len, offered))):
            asked = [i for i, nodes in enumerate(offered) if sibling < len(nodes) and alive[i] not in moved]
            if not asked:
                break
            rows = [alive[i] for i in asked]
            nodes = [offered[i][sibling] for i in asked]
            above = [here[row] for row in rows]
            verdict = rule.judge(walk.positions(rows, above, nodes, p_MV[asked], soft_MV[asked]))
            u_M = uniforms_BT[rows, nodes].to(verdict.accept_M.device)
            # A point mass accepts with exactly 1, which u < 1 always passes.
            accepted = (u_M < verdict.accept_M.double()).tolist()
            for row, node, yes in zip(rows, nodes, accepted, strict=True):
                if yes or (row, node) in kept:
                    moved.add(row)
                    paths[row].append(node)
            p_MV[asked] = _normalised(verdict.residual_MV, p_MV[asked])
        for place, row in enumerate(alive):
            if row not in moved:
                final[row] = p_MV[place]
            else:
                here[row] = paths[row][-1]
        alive = [row for row in alive if row in moved]
    stacked_BV = torch.stack([final[row] for row in range(len(params))])
    return walk.verdicts(paths, draw(stacked_BV, uniforms_BT[:, -1]))


def draw(p_BV: Tensor, uniforms_B: Tensor) -> list[int]:
    """One token a row: where the cumulative weight passes u × total."""
    mass_BV = p_BV.double().cumsum(dim=-1)
    target_B1 = uniforms_B[:, None].to(mass_BV) * mass_BV[:, -1:]
    # right=True finds the first entry above the target, whose own weight is therefore positive.
    found: list[int] = torch.searchsorted(mass_BV, target_B1, right=True)[:, 0].clamp_(max=p_BV.shape[1] - 1).tolist()
    return found


class _Walk:
    """Logits and drafts of a batch, asked about single positions of some rows."""

    def __init__(self, logits_BTV: Tensor, drafts: Drafts, params: Sequence[SamplingParams]) -> None:
        self.logits_BTV, self.drafts, self.params = logits_BTV, drafts, params
        self.greedy_B = torch.tensor([p.temperature == 0 for p in params], device=logits_BTV.device)

    def target(self, rows: list[int], above: list[int]) -> tuple[Tensor, Tensor]:
        """p behind a node of each row, and its untempered form."""
        logits_MV = self.logits_BTV[rows, [node + 1 for node in above]]
        return distribution(logits_MV, [self.params[row] for row in rows])

    def positions(
        self, rows: list[int], above: list[int], nodes: list[int], p_MV: Tensor, soft_MV: Tensor
    ) -> Positions:
        """Nodes to be judged, each behind its parent, which is `above`."""
        drafts = self.drafts
        tokens_M = drafts.tokens_BN[rows, nodes].to(p_MV.device)
        points_MV = point(tokens_M, p_MV.shape[-1])
        own_MV = points_MV if drafts.probs_BNV is None else drafts.probs_BNV[rows, nodes].float()
        greedy_M = self.greedy_B[rows]
        q_MV = torch.where(greedy_M[:, None], points_MV, own_MV) if drafts.drawn else points_MV
        logits_MV = self.logits_BTV[rows, [node + 1 for node in above]].float()
        return Positions(logits_MV, p_MV, q_MV, soft_MV, own_MV, tokens_M, greedy_M)

    def verdicts(self, paths: list[list[int]], last: list[int]) -> list[Verdict]:
        tokens = [
            (*self.drafts.tokens_BN[row, path].tolist(), token)
            for row, (path, token) in enumerate(zip(paths, last, strict=True))
        ]
        rows = [row for row, path in enumerate(paths) for _ in range(len(path) + 1)]
        _, soft_KV = self.target(rows, [node for path in paths for node in (ROOT, *path)])
        chosen_K = soft_KV.gather(1, torch.tensor([t for each in tokens for t in each], device=soft_KV.device)[:, None])
        # A lossy rule may keep what truncation left out: its log-probability stays finite.
        logprobs = chosen_K[:, 0].clamp(min=torch.finfo(torch.float32).tiny).log().clamp_(max=0.0).tolist()
        ends = list(accumulate(map(len, tokens)))
        return [
            Verdict(tuple(path), own, tuple(logprobs[end - len(own) : end]))
            for path, own, end in zip(paths, tokens, ends, strict=True)
        ]


def _forgiven(rule: Fly, walk: _Walk, uniforms_BT: Tensor) -> frozenset[tuple[int, int]]:
    """Rows and nodes of the chains where a refusal is kept: strict asked at every position, as if all before stayed."""
    found = set()
    for row, size in enumerate(walk.drafts.sizes):
        if not size:
            continue
        rows, nodes = [row] * size, list(range(size))
        above = [node - 1 for node in nodes]
        at = walk.positions(rows, above, nodes, *walk.target(rows, above))
        refused = (uniforms_BT[row, :size].to(at.p_MV.device) >= rule.judge(at).accept_M.double()).tolist()
        kept = forgiven(refused, rule.may_wait(at).tolist(), rule.window)
        found |= {(row, node) for node in nodes if kept[node]}
    return frozenset(found)


def _children(drafts: Drafts) -> list[dict[int, list[int]]]:
    """For each row: node -> its children, in order."""
    found: list[dict[int, list[int]]] = []
    for parents in drafts.parents_BN.tolist():
        below: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            if parent != PADDING:
                below.setdefault(parent, []).append(node)
        found.append(below)
    return found


def _normalised(weights_MV: Tensor, otherwise_MV: Tensor) -> Tensor:
    """Weights as a distribution; where rounding left none, what stood there before."""
    total_M1 = weights_MV.sum(dim=-1, keepdim=True)
    return torch.where(total_M1 > 0, weights_MV / total_M1.clamp(min=torch.finfo(torch.float32).tiny), otherwise_MV)
