"""The forward pass computes what `transformers` computes, and nothing of a model is replaced by half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    ARCHITECTURES,
    BASE,
    VOCABULARY,
    local,
    make_cache,
    make_checkpoint,
    make_decoder,
    reference,
    reference_logits,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from shoal.engine import model as engine_model
from shoal.engine import prefill
from shoal.engine.cache import KVCache
from shoal.engine.model import Architecture, Decoder
from shoal.engine.sequence import Sequence as Running
from shoal.engine.source import LocalModel
from shoal.errors import ModelError
from shoal.protocol.sampling import SampleRequest

TOLERANCE = 1e-4


def some_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def logits_of(decoder: Decoder, cache: KVCache, rows: list[list[int]], pieces: list[int]) -> list[Tensor]:
    """Logits after each id of each row; the rows are fed together, in pieces of these widths, padded at their end."""
    width = max(len(row) for row in rows)
    assert sum(pieces) == width
    cache.reserve(len(rows), width, 0)
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    found, start = [], 0
    for piece in pieces:
        offset = torch.full((len(rows),), start)
        hidden = decoder.forward(padded[:, start : start + piece], offset, cache)
        found.append(decoder.logits(hidden).float())
        start += piece
    together = torch.cat(found, dim=1)
    return [together[index, : len(row)] for index, row in enumerate(rows)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, architecture)
    peer, decoder = reference(directory), make_decoder(directory)
    rows = [some_ids(70, 1), some_ids(7, 2), some_ids(41, 3)]
    wanted = [reference_logits(peer, row) for row in rows]
    assert max(float(w.std()) for w in wanted) > 0.5, "a model without preferences proves nothing"
    for pieces in ([70], [32, 31, 7], [64, *[1] * 6]):
        for got, want in zip(logits_of(decoder, make_cache(decoder), rows, pieces), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ["llama-grouped-tied", "qwen3"])
def test_the_fused_kernel_gives_the_same(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path, architecture)
    peer, decoder = reference(directory), make_decoder(directory)
    rows = [some_ids(50, 1), some_ids(20, 2)]
    monkeypatch.setattr(engine_model, "FEW_SCORES", 0)
    for got, row in zip(logits_of(decoder, make_cache(decoder), rows, [30, 19, 1]), rows, strict=True):
        torch.testing.assert_close(got, reference_logits(peer, row), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ["llama-untied-biases", "qwen2", "qwen3"])
def test_bf16_is_as_exact_as_bf16_of_transformers(architecture: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, architecture)
    ids = some_ids(60)
    exact = reference_logits(reference(directory), ids)
    theirs = (reference_logits(reference(directory, torch.bfloat16), ids) - exact).abs()
    decoder = make_decoder(directory, torch.bfloat16)
    ours = (logits_of(decoder, make_cache(decoder), [ids], [50, *[1] * 10])[0] - exact).abs()
    assert float(ours.mean()) < 1.3 * float(theirs.mean())
    assert float(ours.max()) < 2 * float(theirs.max())


def test_a_draft_that_is_not_taken_leaves_no_trace(plain: Path, plain_reference: Any) -> None:
    decoder = make_decoder(plain)
    cache = make_cache(decoder)
    cache.reserve(2, 40, 0)
    ids = some_ids(30)
    both = torch.tensor([ids, ids])
    decoder.forward(both[:, :20], torch.tensor([0, 0]), cache)
    decoder.forward(torch.tensor([some_ids(8, 7), some_ids(8, 8)]), torch.tensor([20, 20]), cache)
    # Rows go on from different positions: the second has to write the tokens from 17 on again.
    hidden = decoder.forward(torch.tensor([ids[20:26], ids[17:23]]), torch.tensor([20, 17]), cache)
    want = reference_logits(plain_reference, ids)
    torch.testing.assert_close(decoder.logits(hidden[0]), want[20:26], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(decoder.logits(hidden[1]), want[17:23], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("width", [1, 5, 16, 512])
def test_prompts_longer_than_the_prefill_width(
    width: int, plain: Path, plain_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "PREFILL_WIDTH", width)
    decoder = make_decoder(plain)
    cache = make_cache(decoder)
    prompts = [tuple(some_ids(n, n)) for n in (33, 32, 16, 5, 1)]
    leaders = [Running(SampleRequest(prompt), lambda _: None) for prompt in prompts]
    cache.reserve(len(prompts), 33, 0)
    pieces = list(prefill.compute(decoder, cache, leaders, [0] * 5, 0, budget=1000))
    assert pieces[0] == 5 * min(width, 33)
    for leader, prompt in zip(leaders, prompts, strict=True):
        want = reference_logits(plain_reference, prompt)[-1]
        assert leader.prompt_hidden is not None
        torch.testing.assert_close(decoder.logits(leader.prompt_hidden), want, rtol=0, atol=TOLERANCE)


def test_the_embedded_model(embedded: LocalModel, embedded_reference: Any) -> None:
    from shoal.engine.tokenizer import Tokenizer
    from shoal.protocol.chat import Message

    decoder = make_decoder(embedded.directory)
    ids = Tokenizer(embedded.directory).prompt([Message("user", "What is 17 + 25?")])
    rows = [ids, ids[:20]]
    got = logits_of(decoder, make_cache(decoder), rows, [len(ids) - 2, 1, 1])
    for row, logits in zip(rows, got, strict=True):
        torch.testing.assert_close(logits, reference_logits(embedded_reference, row), rtol=0, atol=TOLERANCE)


def test_weights_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "first", "qwen2-untied-yarn", seed=1)
    other = make_checkpoint(tmp_path / "other", "qwen2-untied-yarn", seed=2)
    decoder = make_decoder(first)
    ids = some_ids(12)

    def logits() -> Tensor:
        return logits_of(decoder, make_cache(decoder), [ids], [12])[0]

    before = logits()
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for damaged, complaint in (
        ({k: v for k, v in tensors.items() if k != name}, "lacks tensor"),
        ({**tensors, name: tensors[name][:-1]}, "has shape"),
        ({**tensors, name: tensors[name].to(torch.int8)}, "int8"),
        ({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, "float8"),
    ):
        with pytest.raises(ModelError, match=complaint) as caught:
            decoder.load(damaged)
        assert name in str(caught.value)
        assert torch.equal(logits(), before)
    decoder.load(tensors)
    torch.testing.assert_close(logits(), reference_logits(reference(other), ids), rtol=0, atol=TOLERANCE)
    decoder.load(load_file(first / "model.safetensors"))
    assert torch.equal(logits(), before)


def test_tensor_names_are_the_checkpoints(tmp_path: Path) -> None:
    for index, architecture in enumerate(ARCHITECTURES):
        directory = make_checkpoint(tmp_path / str(index), architecture)
        assert set(make_decoder(directory).tensor_names) == set(local(directory).tensors())


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("gpt2", {}, "gpt2"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 128}, "sliding"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(kind: str, changes: dict[str, Any], complaint: str) -> None:
    base = {} if kind == "gpt2" else BASE
    config = AutoConfig.for_model(kind, **{**base, **changes})
    with pytest.raises(ModelError, match=complaint):
        Decoder(config, torch.float32, torch.device("cpu"))


def test_architecture_reads_what_qwen2_leaves_out() -> None:
    config = AutoConfig.for_model("qwen2", **BASE)
    arch = Architecture.from_config(config)
    assert (arch.attention_bias, arch.output_bias, arch.qk_norm, arch.head_dim) == (True, False, False, 12)
