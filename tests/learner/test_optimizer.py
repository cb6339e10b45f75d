"""AdamW on masters: torch's own in fp32, and more than bf16 can hold in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import RecordError
from shoal.learner.optimizer import MasterAdamW, learning_rate


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (7, 5), "bias": (5,), "other": (3, 4)}
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}


def optimizer(own: dict[str, nn.Parameter], grad_clip: float = 1e9) -> MasterAdamW:
    return MasterAdamW(own, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, grad_clip=grad_clip)


def give_gradients(own: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in own.values():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def test_equals_torch_in_fp32() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    mine = optimizer(ours, grad_clip=0.5)
    adam = torch.optim.AdamW(
        [
            {"params": [theirs["matrix"], theirs["other"]], "weight_decay": 0.1},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        foreach=False,
    )
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adam.step()
        mine.accumulate()
        done = mine.step(1e-2)
        assert done.applied
        assert done.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_summed_in_fp32() -> None:
    own = parameters(torch.bfloat16)
    mine = optimizer(own)
    exact: dict[str, Tensor] = {name: torch.zeros(p.shape) for name, p in own.items()}
    for step in range(300):
        give_gradients(own, step % 3, scale=1e-3)
        for name, p in own.items():
            exact[name] += p.grad.float()
        mine.accumulate()
        assert all(p.grad is None for p in own.values())
    norm = torch.sqrt(sum((g**2).sum() for g in exact.values()))
    assert mine.step(0.0).grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_bf16_weights_move_though_single_steps_are_below_their_resolution() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    naive = torch.ones(4, dtype=torch.bfloat16)
    mine = MasterAdamW({"w": weight}, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, grad_clip=1e9)
    for _ in range(100):
        weight.grad = torch.ones(4, dtype=torch.bfloat16)
        mine.accumulate()
        mine.step(1e-4)
        naive -= 1e-4
    assert (naive == 1).all()
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.99), rtol=0, atol=0.004)
    torch.testing.assert_close(mine.state_dict()["master.w"], torch.full((4,), 0.99), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    own = parameters(dtype)
    mine = optimizer(own)
    give_gradients(own, 0)
    mine.accumulate()
    mine.step(1e-2)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in own.items()}
    give_gradients(own, 1)
    own["bias"].grad[2] = bad
    mine.accumulate()
    assert not mine.step(1e-2).applied
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert all(torch.equal(p, weights[name]) for name, p in own.items())
    give_gradients(own, 2)
    mine.accumulate()
    assert mine.step(1e-2).applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_bit_for_bit(dtype: torch.dtype) -> None:
    own = parameters(dtype)
    first = optimizer(own)
    for step in range(3):
        give_gradients(own, step)
        first.accumulate()
        first.step(1e-2)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    copied = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
    second = optimizer(copied)
    second.load_state_dict(state)
    for step in range(3, 6):
        for params, opt in ((own, first), (copied, second)):
            give_gradients(params, step)
            opt.accumulate()
            opt.step(1e-2)
    for name, p in own.items():
        assert torch.equal(p, copied[name])


def test_a_state_of_another_model_is_refused() -> None:
    mine = optimizer(parameters(torch.bfloat16))
    state = mine.state_dict()
    with pytest.raises(RecordError, match=r"master\.bias"):
        mine.load_state_dict({name: value for name, value in state.items() if name != "master.bias"})
    with pytest.raises(RecordError, match="unknown"):
        mine.load_state_dict({**state, "master.more": torch.zeros(1)})
    with pytest.raises(RecordError, match="shape"):
        mine.load_state_dict({**state, "master.bias": torch.zeros(6)})


def test_the_learning_rate_warms_up_and_stays() -> None:
    assert [learning_rate(1.0, 4, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(0.5, 0, 0) == 0.5


def test_a_falling_learning_rate_ends_at_zero_after_the_last_step() -> None:
    linear = [learning_rate(1.0, 2, step, schedule="linear", total_steps=5) for step in range(7)]
    assert linear == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    cosine = [learning_rate(1.0, 0, step, schedule="cosine", total_steps=3) for step in range(4)]
    assert cosine == pytest.approx([0.8535533, 0.5, 0.1464466, 0.0])
