"""Steps as frames, and what a stage refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import local, make_cache, make_decoder
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.engine.features import Features
from shoal.engine.pipeline.stage import Stage, layer_bytes, layer_seconds
from shoal.engine.pipeline.weights import Shelf, chosen, config_of, fetch
from shoal.engine.pipeline.wire import from_bytes, split_bytes, to_bytes
from shoal.engine.speculation.drafts import ancestors
from shoal.errors import ModelError, RecordError
from shoal.protocol.codec import decode, encode
from shoal.protocol.stage import (
    MAX_STEP_BYTES,
    PIECE_BYTES,
    PREFIX,
    Assignment,
    CacheOp,
    Reassembly,
    Step,
    TensorPiece,
    TensorRequest,
    frames,
)

CPU = torch.device("cpu")
ASSIGNMENT = Assignment(
    epoch=3, stage=0, num_stages=2, first=0, last=1, lanes=2, lane_slots=4, lane_tokens=256, previous=b"", next=None
)
STEP = Step(
    epoch=3, lane=1, number=7, stage=0, width=2, start=(0, 0), first_slot=0, ops=(CacheOp("reserve", 2, 32, 0),)
)
IDS = to_bytes(torch.tensor([[5, 6], [7, 8]], dtype=torch.int32))


@given(st.lists(st.tuples(st.binary(max_size=100), st.binary(max_size=3 * PIECE_BYTES)), max_size=4))
def test_steps_come_out_of_frames_as_they_went_in(steps: list[tuple[bytes, bytes]]) -> None:
    parts, found = Reassembly(), []
    for header, tensor in steps:
        for frame in frames(header, tensor):
            assert len(frame) <= PIECE_BYTES
            if (whole := parts.add(frame)) is not None:
                found.append(whole)
    assert found == steps


@pytest.mark.parametrize(
    "frame",
    [b"", b"\0" * 7, PREFIX.pack(1, MAX_STEP_BYTES + 1), PREFIX.pack(2**31, 1), PREFIX.pack(1, 1) + b"three"],
)
def test_frames_that_are_none_are_refused(frame: bytes) -> None:
    with pytest.raises(RecordError):
        Reassembly().add(frame)


@given(st.binary(max_size=300))
def test_no_bytes_make_a_header_that_is_out_of_range(data: bytes) -> None:
    try:
        step = decode(data, Step)
    except RecordError:
        return
    step.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_travel_bit_by_bit(dtype: torch.dtype) -> None:
    sent = torch.randn(3, 2, 8).to(dtype)
    sent[0, 0, 0] = float("nan")
    found = from_bytes(to_bytes(sent), dtype, (3, 2, 8), CPU)
    assert to_bytes(found) == to_bytes(sent)


@pytest.fixture
def stage(plain: Path) -> Stage:
    made = Stage(local(plain).config(), torch.float32, CPU, ASSIGNMENT)
    made.load(chosen(local(plain), made.decoder.shapes))
    return made


def test_a_step_comes_back_for_the_next(stage: Stage) -> None:
    done, data = stage.compute(STEP, IDS)
    assert done.stage == 1 and len(done.busy_s) == 1 and done.number == 7
    assert len(data) == 2 * 2 * stage.decoder.arch.hidden_size * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 2},
        {"stage": 1},
        {"lane": 2},
        {"ops": ()},
        {"ops": (CacheOp("reserve", 8, 32, 0),)},
        {"ops": (CacheOp("reserve", 2, 1024, 0),)},
        {"ops": (CacheOp("reserve", 2, 32, 2),)},
        {"ops": (*STEP.ops, CacheOp("copy", 0, 9, 1))},
        {"ops": (*STEP.ops, CacheOp("copy", 0, 1, 1000))},
        {"ops": (*STEP.ops, CacheOp("clear", 9))},
        {"ops": (*STEP.ops, CacheOp("move", 9, 4, 2))},
        {"ops": (*STEP.ops, CacheOp("move", 0, 32, 2))},
        {"ops": (*STEP.ops, CacheOp("move", 0, 2, 4))},
        {"start": (0, 31)},
        {"first_slot": 3},
        {"width": 3},
        {"start": (0,)},
    ],
    ids=str,
)
def test_a_step_that_asks_for_what_is_not_there_is_refused(stage: Stage, changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        stage.compute(replace(STEP, **changes), IDS)
    stage.renew(replace(ASSIGNMENT, epoch=4))
    stage.compute(replace(STEP, epoch=4), IDS)


def test_ids_that_the_model_does_not_have_are_refused(stage: Stage) -> None:
    for bad in (-1, stage.decoder.arch.vocab_size):
        with pytest.raises(RecordError, match="token ids"):
            stage.compute(STEP, to_bytes(torch.tensor([[5, bad], [7, 8]], dtype=torch.int32)))


def test_steps_out_of_order_are_refused(stage: Stage) -> None:
    stage.compute(STEP, IDS)
    for number in (7, 6):
        with pytest.raises(RecordError, match="out of order"):
            stage.compute(replace(STEP, number=number, ops=()), IDS)
    stage.compute(replace(STEP, number=9, ops=()), IDS)
    stage.compute(replace(STEP, lane=0, number=2), IDS)


@pytest.mark.parametrize(
    "changes",
    [
        {"parents": ((-1,),)},
        {"parents": ((-1, 0), (-1, 0))},
        {"parents": ((0,), (-1,))},
        {"parents": ((-3,), (-1,))},
        {"depths": (1, 0)},
        {"depths": (-1,)},
        {"depths": (0,) * 9},
        {"voids": (1,) * 65},
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        replace(STEP, **changes).check()


def test_a_tree_and_hidden_states_go_through_stages_as_through_one_model(plain: Path) -> None:
    model = local(plain)
    first = Stage(model.config(), torch.float32, CPU, ASSIGNMENT)
    last = Stage(model.config(), torch.float32, CPU, replace(ASSIGNMENT, stage=1, first=1, last=2))
    whole = make_decoder(plain)
    for stage in (first, last):
        stage.load(chosen(model, stage.decoder.shapes))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    parents = ((-1, -1, 0), (-1, 0, -2))
    step = replace(STEP, width=4, parents=parents, depths=(0, 1))
    step.check()
    done, data = last.compute(*first.compute(step, to_bytes(ids.int())))
    assert done.stage == 2
    size = whole.arch.hidden_size
    found = split_bytes(data, torch.float32, [(2, 4, size)] * 3, CPU)
    cache = make_cache(whole)
    cache.reserve(2, 32, 0)
    seen = Features((0, 1))
    start = torch.zeros(2, dtype=torch.int64)
    hidden = whole.forward(ids, start, cache, tree_BTT=ancestors(torch.tensor(parents)), observe=seen)
    for one, other in zip(found, [hidden, *seen.each()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The second branch of the first row stays: its entries move to where they stand in the text.
    moved = replace(step, number=8, stage=0, width=1, start=(2, 3), parents=(), depths=(), busy_s=())
    moved = replace(moved, ops=(CacheOp("move", 0, 2, 1),))
    done, data = last.compute(*first.compute(moved, to_bytes(torch.tensor([[20], [21]]).int())))
    cache.settle(0, 1, [1])
    hidden = whole.forward(torch.tensor([[20], [21]]), torch.tensor([2, 3]), cache)
    torch.testing.assert_close(split_bytes(data, torch.float32, [(2, 1, size)], CPU)[0], hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(RecordError, match="wrong size"):
        last.compute(replace(done, number=9, stage=1, depths=(0,), busy_s=()), b"\0" * (2 * size * 4))


def test_layers_that_the_model_does_not_have_are_refused(plain: Path) -> None:
    with pytest.raises(RecordError, match="the model has 2"):
        Stage(local(plain).config(), torch.float32, CPU, replace(ASSIGNMENT, last=3))


async def test_tensors_come_in_pieces_and_whole(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engine.pipeline.weights.MAX_TENSOR_PIECE_BYTES", 1000)
    shelf, model = Shelf(local(plain)), local(plain)

    async def ask(request: TensorRequest) -> TensorPiece:
        return decode(encode(shelf.piece(request)), TensorPiece)

    expected = model.tensors()
    found = await fetch(ask, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("lie", ["shape", "short", "dtype", "more"])
async def test_tensors_that_are_not_what_they_should_be_are_refused(plain: Path, lie: str) -> None:
    shelf = Shelf(local(plain))
    shape = tuple(local(plain).tensors()["model.norm.weight"].shape)

    async def ask(request: TensorRequest) -> TensorPiece:
        piece = shelf.piece(request)
        match lie:
            case "shape":
                return replace(piece, shape=(*shape, 1))
            case "short":
                return replace(piece, data=b"")
            case "dtype":
                return replace(piece, dtype="I32")
            case _:
                return replace(piece, data=piece.data + b"\0")

    with pytest.raises(RecordError):
        await fetch(ask, {"model.norm.weight": shape})


def test_a_config_travels_and_a_bad_one_is_named(plain: Path) -> None:
    config = config_of((plain / "config.json").read_bytes())
    assert config.num_hidden_layers == 2
    assert 0 < layer_seconds(config, torch.float32, CPU) < 60
    assert layer_bytes(config, torch.float32, 1000) > layer_bytes(config, torch.bfloat16, 1000) > 0
    with pytest.raises(ModelError):
        config_of(b"{")
