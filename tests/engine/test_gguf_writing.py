"""A checkpoint written as GGUF is read back as the model that it was, by the reader of `transformers`."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch
from engine_cases import PLAIN, make_checkpoint

from shoal.engine.gguf_writing import Kind, write_gguf
from shoal.engine.source import LocalModel, resolve
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError, ShoalError, StorageError

TEXT = "Hello, what is 12 + 7? ünïcode <|im_end|>"


WAYS: list[tuple[str, Kind]] = [(PLAIN, "f32"), (PLAIN, "bf16"), ("qwen3", "f32"), ("qwen2", "f16")]


@pytest.mark.parametrize(("architecture", "kind"), WAYS)
def test_what_was_written_is_read_back(architecture: str, kind: Kind, tmp_path: Path) -> None:
    # That reader takes Qwen3's heads for 128 wide, whatever the file says.
    width = {"head_dim": 128} if architecture == "qwen3" else {}
    model = LocalModel("m", make_checkpoint(tmp_path / "model", architecture, **width))
    assert write_gguf(model, tmp_path / "m.gguf", kind) == (tmp_path / "m.gguf").stat().st_size
    back = resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
    wanted, found = model.tensors(), back.tensors()
    assert found.keys() == wanted.keys() - ({"lm_head.weight"} if model.config().tie_word_embeddings else set())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2**-7, atol=1e-6)
    assert Tokenizer(back.directory).encode(TEXT) == Tokenizer(model.directory).encode(TEXT)


def test_eight_bits_are_near(tmp_path: Path) -> None:
    model = LocalModel("m", make_checkpoint(tmp_path / "model"))
    write_gguf(model, tmp_path / "m.gguf", "q8_0")
    wanted = model.tensors()["model.embed_tokens.weight"].float()
    (stored,) = [one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if one.name == "token_embd.weight"]
    back = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    assert (back - wanted).abs().max() <= wanted.abs().max() / 100


def test_what_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    model = LocalModel("m", make_checkpoint(tmp_path / "model"))
    write_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(ShoalError, match="is there already"):
        write_gguf(model, tmp_path / "m.gguf")
    (model.directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        write_gguf(model, tmp_path / "other.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_what_cannot_even_be_cleared_up_is_said_in_a_sentence(tmp_path: Path) -> None:
    """As on a read-only disk, where removing what was never made fails as well: here something else has its name."""
    model = LocalModel("m", make_checkpoint(tmp_path / "model"))
    (tmp_path / f".m.gguf.{os.getpid()}").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_gguf(model, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_heads_that_the_reader_takes_for_wider_are_an_error_and_not_another_model(tmp_path: Path) -> None:
    model = LocalModel("m", make_checkpoint(tmp_path / "model", "qwen3"))
    write_gguf(model, tmp_path / "m.gguf", "f32")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
