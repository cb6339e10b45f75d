"""One server with an adapter, an embedding model and weights of 8 bits: what else can be asked by name."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from adapter_files import make_adapter
from engine_cases import local
from serving_cases import MODEL, ChatServer, start
from test_embedding import make_encoder

from shoal.config import Serving
from shoal.engine.embedding import Embedder
from shoal.errors import CapacityError, ConfigError
from shoal.serving.opening import adapter_folders, check_memory

ASKED: dict[str, Any] = {"prompt": "hello there", "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bytes")


@pytest.fixture(scope="module")
def merged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("adapter") / "pirate"
    return folder, make_adapter(folder, model, seed=1)


@pytest.fixture(scope="module")
def several(
    model: Path, encoder: Path, merged: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChatServer]:
    more = ("--adapter", f"pirate={merged[0]}", "--embedding-model", str(encoder))
    with start(model, tmp_path_factory.mktemp("several"), *more) as running:
        yield running


def test_every_model_is_listed(several: ChatServer, encoder: Path) -> None:
    assert [m.id for m in several.client.models.list()] == [MODEL, f"{MODEL}:pirate", str(encoder)]
    assert several.client.models.retrieve(f"{MODEL}:pirate").id == f"{MODEL}:pirate"


def test_an_adapter_draws_what_the_merged_model_draws(several: ChatServer, merged: tuple[Path, Any]) -> None:
    done = several.client.completions.create(model=f"{MODEL}:pirate", **ASKED, extra_body={"return_token_ids": True})
    assert done.model == f"{MODEL}:pirate"
    choice: Any = done.choices[0]
    with torch.inference_mode():
        ids = torch.tensor([[*choice.prompt_token_ids, *choice.token_ids]])
        logits = merged[1](ids).logits[0, len(choice.prompt_token_ids) - 1 : -1]
    drawn = logits[torch.arange(len(choice.token_ids)), choice.token_ids]
    assert float((logits.amax(-1) - drawn).max()) < 1e-3
    assert several.client.completions.create(model=MODEL, **ASKED).choices[0].text != choice.text
    for name in (f"{MODEL}:parrot", "pirate", f"{MODEL}:"):
        with pytest.raises(openai.NotFoundError):
            several.client.completions.create(model=name, **ASKED)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_told_where_they_are_asked_for(several: ChatServer, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
    asked |= {"seed": 4, "logprobs": True, "n": 2, "extra_body": {"return_token_ids": True}}
    whole: Any = several.client.chat.completions.create(**asked)
    assert whole.prompt_token_ids
    for choice in whole.choices:
        ended = choice.finish_reason == "stop"
        assert len(choice.token_ids) == len(choice.logprobs.content) + ended
    if stream:
        ids: list[list[int]] = [[], []]
        prompt = None
        for chunk in several.client.chat.completions.create(**asked, stream=True):
            said: Any = chunk
            prompt = prompt or getattr(said, "prompt_token_ids", None)
            for choice in said.choices:
                ids[choice.index] += choice.token_ids
        assert ids == [choice.token_ids for choice in whole.choices]
        assert prompt == whole.prompt_token_ids
    plain: Any = several.client.chat.completions.create(**{**asked, "extra_body": {}})
    assert not hasattr(plain, "prompt_token_ids") and not hasattr(plain.choices[0], "token_ids")


async def test_embeddings_are_those_of_the_model(several: ChatServer, encoder: Path) -> None:
    texts = ["the well", "another text", "é"]
    answer = several.client.embeddings.create(model=str(encoder), input=texts)
    async with Embedder(local(encoder)) as embedder:
        ids = [embedder.encode(text) for text in texts]
        vectors = await embedder.embed(ids)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    for entry, vector in zip(answer.data, vectors, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-5)
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    floats = several.client.embeddings.create(model=str(encoder), input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    by_ids = several.client.embeddings.create(model=str(encoder), input=[list(one) for one in ids])
    assert by_ids.data[2].embedding == pytest.approx(vectors[2], abs=1e-5)
    one = several.client.embeddings.create(model=str(encoder), input=list(ids[1]), dimensions=7)
    length = sum(x * x for x in vectors[1][:7]) ** 0.5
    assert one.data[0].embedding == pytest.approx([x / length for x in vectors[1][:7]], abs=1e-5)
    raw = several.post("/embeddings", {"model": str(encoder), "input": "the well", "encoding_format": "base64"})
    packed = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert struct.unpack("<32f", packed) == pytest.approx(vectors[0], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"input": ""}, 400),
        ({"input": []}, 400),
        ({"input": ["a", ""]}, 400),
        ({"input": [[]]}, 400),
        ({"input": "x" * 500}, 400),
        ({"input": [999_999]}, 400),
        ({"input": [[-1]]}, 400),
        ({"input": ["a"] * 2049}, 400),
        ({"input": [[5]] * 2049}, 400),
        ({"input": "a", "dimensions": 33}, 400),
        ({"input": "a", "dimensions": 0}, 400),
        ({"input": "a", "encoding_format": "hex"}, 400),
        ({"input": {"a": 1}}, 400),
        ({"input": "a", "model": MODEL}, 404),
    ],
)
def test_what_cannot_be_embedded_is_said(several: ChatServer, encoder: Path, body: dict[str, Any], status: int) -> None:
    answer = several.post("/embeddings", {"model": str(encoder), **body})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    several.until_idle()


def test_without_an_embedding_model_there_is_none(server: ChatServer) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model=MODEL, input="a")


@pytest.mark.parametrize("given", ["pirate", "=folder", "pirate=", "a:b=folder"])
def test_adapters_have_names_of_their_own(given: str) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        adapter_folders(Serving(adapters=(given,)))
    with pytest.raises(ConfigError, match="name of its own"):
        adapter_folders(Serving(adapters=("a=x", "a=y")))


@pytest.mark.parametrize("changes", [{"adapters": ("a=x",)}, {"weights": "int8"}])
def test_over_stages_there_are_neither_adapters_nor_8_bits(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not served over stages"):
        adapter_folders(Serving(stages=2, **changes))


def test_what_does_not_fit_the_memory_is_refused_with_the_numbers(model: Path) -> None:
    check_memory(local(model), Serving(device="cpu"))
    with pytest.raises(CapacityError, match=r"10{12} cached tokens .* MiB are free"):
        check_memory(local(model), Serving(device="cpu", cache_tokens=10**12))
