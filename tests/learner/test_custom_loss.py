"""A loss by import path: the same as ours where it computes the same, and refused where it gives something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shoal.config import CustomLoss, GrpoLoss
from shoal.errors import ConfigError
from shoal.learner.losses.common import TokenInputs, clipped_surrogate
from shoal.learner.losses.custom import custom_loss
from shoal.learner.losses.grpo import grpo_loss


def like_grpo(inputs: TokenInputs, options: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(inputs.logprobs - inputs.behaviour)
    return clipped_surrogate(ratio, inputs.advantages, eps_low=options["eps"], eps_high=options["eps"], delta=None)


def one_number(inputs: TokenInputs, options: Mapping[str, float]) -> Tensor:
    return (inputs.logprobs * inputs.advantages).sum()


def inputs(logprobs: Tensor) -> TokenInputs:
    torch.manual_seed(1)
    count = len(logprobs)
    return TokenInputs(
        logprobs=logprobs,
        behaviour=logprobs.detach() + torch.randn(count) / 2,
        advantages=torch.randn(count),
        weights=torch.rand(count),
        sequence=torch.zeros(count, dtype=torch.int64),
        num_sequences=1,
        reference=logprobs.detach() - 0.3,
    )


def settings(name: str, **more: Any) -> CustomLoss:
    return CustomLoss(type="custom", function=f"{__name__}:{name}", **more)


def test_it_is_the_same_loss_where_it_computes_the_same() -> None:
    ours, theirs = (torch.linspace(-5, -0.1, 40).requires_grad_() for _ in range(2))
    one = custom_loss(inputs(ours), settings("like_grpo", options={"eps": 0.2}, kl_beta=0.1))
    other = grpo_loss(inputs(theirs), GrpoLoss(kl_beta=0.1))
    one.loss.backward()
    other.loss.backward()
    assert torch.equal(one.loss, other.loss) and ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad) and one.stats == other.stats


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="each of the trained tokens"):
        custom_loss(inputs(torch.zeros(3)), settings("one_number"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        custom_loss(inputs(torch.zeros(3)), settings("no_such_function"))
    with pytest.raises(ValidationError):
        CustomLoss(type="custom", function="nonsense")
