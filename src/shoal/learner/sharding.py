"""A policy in parts, one on each rank (FSDP2), and whole again.

    fully_shard(layer) for each layer, fully_shard(policy)       parameters live as shards, split along their rows
    forward, backward    a layer's shards are gathered before it computes and dropped after it
    gradients            summed over the ranks in fp32, each rank keeps those of its shard

1. FSDP averages gradients over ranks. Here they are *summed*: a token's weight in the loss is that of the whole step
   (`losses.normalisation`), however the step is cut into micro-batches and these are dealt to ranks. An average of
   averages would weigh the tokens of a rank that got few of them more.
2. Trained weights are held in fp32 and computed with in the model's dtype: they are the optimizer's masters, in parts.

Invariants: the sum of all ranks' gradients is one process's, but for the order of additions; every row of a step counts
on exactly one rank; all ranks compute equally many rows, because each pass is a collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shoal.learner.forward import Policy
from shoal.learner.packing import MicroBatch
from shoal.learner.ranks import Ranks


def shard(policy: Policy, ranks: Ranks, dtype: torch.dtype) -> None:
    """Split a policy's parameters over the ranks, in place; trained ones must be fp32.

    Args:
        dtype: what is computed in.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers: Sequence[nn.Module] = policy.model.base_model.layers
    for module in (*layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        # FSDP notes at its first gathering what is trained, and a first pass may be one with the adapters switched off.
        module.unshard()
        module.reshard()


def row_tokens(total: int, ranks: int, most: int) -> int:
    """Tokens of a micro-batch, so that a step that is short gives each rank some: at most `most`."""
    return max(1, min(most, -(-total // ranks)))


def deal(rows: Sequence[MicroBatch], rank: int, ranks: int) -> list[tuple[MicroBatch, bool]]:
    """A rank's rows, and whether each counts; every rank gets equally many.

    The longest go first, one to each rank, so that all ranks have about as much to do at any time. Where the rows do
    not come out even, a rank computes a short one that counts on another.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    turns = -(-len(rows) // ranks)
    dealt = [turn * ranks + rank for turn in range(turns)]
    return [(rows[order[min(at, len(order) - 1)]], at < len(order)) for at in dealt]
