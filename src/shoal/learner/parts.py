"""Tensors of which each rank holds some rows: a rank's own part, the whole again, and a whole cut anew.

Where the learner is one process nothing is in parts, and every function here gives back what it was given.

Invariants: parts are cut as FSDP cuts them; what is whole is the same on however many ranks it was in parts, so that a
checkpoint made by some ranks is read by any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from shoal.learner.checkpoint import Checkpoint
from shoal.learner.ranks import Ranks


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; all of it where it is not in parts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of `like`'s shape from the parts that all ranks hold; a collective where `like` is in parts."""
    if not isinstance(like, DTensor):
        return part
    joined = DTensor.from_local(
        part, like.device_mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    )
    return joined.full_tensor()


def cut(tensor: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of a whole tensor; single numbers are everybody's."""
    if tensor.ndim == 0:
        return tensor
    parts = torch.chunk(tensor, ranks.size, dim=0)
    return parts[ranks.rank] if ranks.rank < len(parts) else tensor[:0]


def whole_parameters(
    parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype], ranks: Ranks | None
) -> dict[str, Tensor]:
    """Parameters by name, whole, each in its dtype; of several ranks on the leader only, on its CPU."""
    found = {}
    for name, parameter in parameters.items():
        joined = whole(own_part(parameter.detach()), parameter).to(dtypes[name])
        if ranks is None or ranks.leads:
            found[name] = joined if ranks is None else joined.cpu()
    return found


def whole_state(
    state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The optimizer's state as that of one process, masters included; on the leader only.

    Args:
        state: of this rank's parts, as `MasterAdamW.state_dict` gives it.
        dtypes: what the model's parameters were loaded in.
    """
    found = {}
    for name, parameter in parameters.items():
        if dtypes[name] != torch.float32:
            found[f"master.{name}"] = whole(own_part(parameter.detach()), parameter).cpu()
        for key in [key for key in state if key.partition(".")[2] == name]:
            found[key] = (state[key] if state[key].ndim == 0 else whole(state[key], parameter)).cpu()
    return found if ranks.leads else {}


def parts_of(checkpoint: Checkpoint, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's part of a checkpoint's weights, as fp32 masters, and of its optimizer's state."""
    state = checkpoint.optimizer
    masters = {name: state.get(f"master.{name}", weight) for name, weight in checkpoint.weights.items()}
    weights = {name: cut(master, ranks).float() for name, master in masters.items()}
    return weights, {key: cut(value, ranks) for key, value in state.items() if not key.startswith("master.")}
