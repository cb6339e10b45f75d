"""Draw one token a row from logits, and say with which log-probability it was drawn.

Invariant: a reported log-probability is that of the distribution the token was really drawn from: tempered, and
truncated where top-k or top-p ask for it. (Greedy rows report the untempered one; nobody may train on those.)

A row's draw depends on its own logits and its own uniform number alone, by inversion of the cumulative
distribution: a seeded request gives the same tokens whatever else is in the batch, up to near-ties in the logits.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.protocol.sampling import SamplingParams


@torch.inference_mode()
def sample(
    logits_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Token ids and their log-probabilities (nats), one a row.

    Args:
        logits_BV: fp32.
        uniforms: one number in [0, 1) a row; unused for greedy rows.
    """
    temperatures = [p.temperature or 1.0 for p in params]
    if any(t != 1.0 for t in temperatures):
        logits_BV = logits_BV / torch.tensor(temperatures, device=logits_BV.device)[:, None]
    for row, p in enumerate(params):
        if p.temperature > 0 and not p.is_exact:
            logits_BV[row] = truncate(logits_BV[row], p.top_k, p.top_p)
    log_total_B = torch.logsumexp(logits_BV, dim=-1)
    greedy = [p.temperature == 0 for p in params]
    if all(greedy):
        ids_B = logits_BV.argmax(dim=-1)
    else:
        mass_BV = torch.cumsum(torch.exp(logits_BV - log_total_B[:, None]), dim=-1)
        targets_B = torch.tensor(uniforms, dtype=torch.float32, device=logits_BV.device) * mass_BV[:, -1]
        # right=True: the first index whose mass exceeds the target, so a token of probability 0 is never drawn.
        ids_B = torch.searchsorted(mass_BV, targets_B[:, None], right=True)[:, 0]
        ids_B = ids_B.clamp_(max=logits_BV.shape[-1] - 1)
        if any(greedy):
            ids_B = torch.where(torch.tensor(greedy, device=ids_B.device), logits_BV.argmax(dim=-1), ids_B)
    logprobs_B = logits_BV.gather(1, ids_B[:, None])[:, 0] - log_total_B
    return ids_B.tolist(), logprobs_B.clamp_(max=0.0).tolist()


def truncate(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the `top_k` largest, then all but the smallest set of mass ≥ `top_p`, at −∞."""
    logits_V = logits_V.clone()
    if 0 < top_k < logits_V.shape[-1]:
        kth = torch.topk(logits_V, top_k).values[-1]
        logits_V[logits_V < kth] = float("-inf")
    if top_p < 1.0:
        ordered, order = torch.sort(logits_V, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        logits_V[order[before >= top_p]] = float("-inf")
    return logits_V
