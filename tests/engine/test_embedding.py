"""Embeddings against transformers' own hidden states, pooled here by hand."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PLAIN, local, make_checkpoint, make_tokenizer
from transformers import AutoModel, BertConfig, BertModel

from shoal.engine import embedding
from shoal.engine.embedding import Embedder, shortened
from shoal.errors import CapacityError, ModelError

TEXTS = ["the well", "a long text about nothing in particular, the thing in the well", "é", "x" * 60]


def make_encoder(directory: Path) -> Path:
    """A tiny BERT over bytes."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=80, pad_token_id=2,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.inference_mode()
def by_hand(directory: Path, ids: tuple[int, ...], how: str) -> list[float]:
    """One text alone, so nothing is padded."""
    model: Any = AutoModel.from_pretrained(str(directory), dtype=torch.float32).eval()
    hidden = model(torch.tensor([ids])).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[how]
    found: list[float] = (pooled / pooled.norm()).tolist()
    return found


def pools_by(directory: Path, **modes: bool) -> None:
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))


@pytest.mark.parametrize("how", ["mean", "first", "last"])
async def test_an_encoder_pools_as_its_folder_says(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 150)  # several passes
    folder = make_encoder(tmp_path)
    if how != "mean":
        pools_by(folder, pooling_mode_cls_token=how == "first", pooling_mode_lasttoken=how == "last")
    async with Embedder(local(folder)) as embedder:
        assert embedder.pooling == how and embedder.size == 32
        inputs = [embedder.encode(text) for text in TEXTS]
        halves = await asyncio.gather(embedder.embed(inputs[:2]), embedder.embed(inputs[2:]))
        for ids, vector in zip(inputs, [*halves[0], *halves[1]], strict=True):
            assert vector == pytest.approx(by_hand(folder, ids, how), abs=1e-5)
            assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)


async def test_a_causal_model_takes_the_last_token(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, PLAIN)
    async with Embedder(local(folder)) as embedder:
        assert embedder.pooling == "last"
        ids = embedder.encode(TEXTS[1])
        (vector,) = await embedder.embed([ids])
        assert vector == pytest.approx(by_hand(folder, ids, "last"), abs=1e-5)
        short = shortened(vector, 5)
        length = sum(x * x for x in vector[:5]) ** 0.5
        assert short == pytest.approx([x / length for x in vector[:5]])


async def test_what_can_never_be_embedded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Embedder(local(make_encoder(tmp_path))) as embedder:
        for inputs in ([()], [(5,) * 81], [(300,)], [(-1,)]):
            with pytest.raises(CapacityError):
                await embedder.embed(inputs)
        monkeypatch.setattr(embedding, "MAX_INPUTS", 3)
        with pytest.raises(CapacityError, match="taken at once"):
            await embedder.embed([(5,)] * 4)


async def test_callers_that_go_are_not_computed_and_a_close_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 40)
    embedder = Embedder(local(make_encoder(tmp_path)))
    one = asyncio.ensure_future(embedder.embed([(5, 6)] * 2000))
    await asyncio.sleep(0.01)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    assert len(await embedder.embed([(7, 8)])) == 1
    assert embedder.num_tokens < 4002
    late = asyncio.ensure_future(embedder.embed([(5, 6)] * 4000))
    await asyncio.sleep(0)
    await embedder.close()
    with pytest.raises((ModelError, asyncio.CancelledError)):
        await late


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model")
    pools_by(folder, pooling_mode_max_tokens=True)
    with pytest.raises(ModelError, match="pooling_mode_max_tokens"):
        Embedder(local(folder))
    (folder / "1_Pooling" / "config.json").write_text("[")
    with pytest.raises(ModelError, match="damaged"):
        Embedder(local(folder))
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no embedding model"):
        Embedder(local(folder))
