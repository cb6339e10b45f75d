"""AdamW with moments of 8 bits: beside torch's own on the same gradients, through a checkpoint, and in bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.errors import RecordError
from shoal.learner.adamw8bit import BLOCK, quantise
from shoal.learner.optimizer import MasterAdamW

SHAPES = {"matrix": (70, 33), "norm": (50,), "wide": (3, 1000)}


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], MasterAdamW]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "grad_clip": 1e9}
    return parameters, MasterAdamW(parameters, kind=kind, **settings)  # type: ignore[arg-type]


def move(parameters: dict[str, nn.Parameter], optimizer: MasterAdamW, step: int, lr: float = 0.01) -> None:
    """One step down a noisy quadratic with curvatures over four orders of magnitude."""
    noise = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        curvature = torch.logspace(-2, 2, parameter.numel()).view_as(parameter)
        parameter.grad = (curvature * parameter.detach().float()).to(parameter.dtype)
        parameter.grad += 0.1 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype)
    optimizer.accumulate()
    assert optimizer.step(lr).applied


@given(st.lists(st.floats(0, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=BLOCK), st.integers(0, 100))
def test_a_value_becomes_one_of_its_neighbours(values: list[float], seed: int) -> None:
    block = torch.zeros(1, BLOCK)
    block[0, : len(values)] = torch.tensor(values)
    noise = torch.rand(1, BLOCK, generator=torch.Generator().manual_seed(seed))
    steps, largest = quantise(block, 255, noise)
    assert steps.min() >= 0 and steps.max() <= 255 and largest == block.max()
    assert torch.all((steps / 255 * largest - block).abs() <= largest / 255 * 1.001)
    assert torch.all(steps[block == 0] == 0)


def test_it_goes_where_adamw_goes() -> None:
    ours, optimizer = made("adamw8bit")
    theirs, reference = made("adamw")
    start = {name: p.detach().clone() for name, p in ours.items()}
    for step in range(200):
        move(ours, optimizer, step)
        move(theirs, reference, step)
    for name in SHAPES:
        apart = (ours[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()
        assert apart < 0.1, f"{name}: {apart}"


def test_it_is_the_same_each_time_and_through_a_checkpoint() -> None:
    one, first = made("adamw8bit", torch.bfloat16)
    for step in range(5):
        move(one, first, step)
    two, second = made("adamw8bit", torch.bfloat16)
    for step in range(3):
        move(two, second, step)
    three, third = made("adamw8bit", torch.bfloat16)
    third.load_state_dict({key: value.clone() for key, value in second.state_dict().items()})
    for step in range(3, 5):
        move(three, third, step)
    assert all(torch.equal(one[name], three[name]) for name in SHAPES)
    with pytest.raises(RecordError):
        made("adamw", torch.bfloat16)[1].load_state_dict(first.state_dict())


def test_its_state_takes_a_quarter() -> None:
    parameters, optimizer = made("adamw8bit")
    move(parameters, optimizer, 0)
    state = optimizer.state_dict()
    assert {value.dtype for key, value in state.items() if key.startswith("exp_avg") and "scale" not in key} == {
        torch.uint8
    }
    large = sum(p.numel() for p in parameters.values())
    taken = sum(value.numel() * value.element_size() for key, value in state.items() if key.startswith("exp_avg"))
    assert taken < 2.2 * large
