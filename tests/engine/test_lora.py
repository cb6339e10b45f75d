"""Adapters per request: rows of several in one step draw what the merged models draw."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter
from engine_cases import PLAIN, local, make_checkpoint, make_decoder, reference_logits
from safetensors.torch import load_file, save_file

from shoal.engine.local import LocalEngine
from shoal.engine.shaping import Shaping
from shoal.errors import ConfigError, ModelError
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
LONG = tuple(range(30, 60))


def assert_greedy(model: Any, prompt: tuple[int, ...], done: Completion) -> None:
    """Every token is the likeliest, up to a near-tie."""
    logits = reference_logits(model, [*prompt, *done.token_ids])[len(prompt) - 1 : -1]
    margins = logits.amax(-1) - logits[torch.arange(len(done.token_ids)), list(done.token_ids)]
    assert float(margins.max()) < 1e-3, margins


@pytest.fixture(scope="module")
def adapters(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Any]]:
    """One that changes every projection, and one that changes two."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {
        "all": make_adapter(folder / "all", plain, seed=1),
        "two": make_adapter(folder / "two", plain, seed=2, targets=("v_proj", "down_proj"), rank=3, use_rslora=True),
    }
    return {name: folder / name for name in models}, models


async def test_rows_of_different_adapters_in_one_step_draw_what_the_merged_models_draw(
    plain: Path, plain_reference: Any, adapters: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    folders, models = adapters
    models = {"": plain_reference, **models}
    prompts = [LONG, tuple(range(70, 80))]
    engine = LocalEngine(
        local(plain), dtype="fp32", device="cpu", context_tokens=256, prefix_tokens=1024, prefill_tokens=32,
        adapters=folders,
    )  # fmt: skip
    async with engine:
        engine.tokenizer.end_ids = frozenset()
        asked = [(name, prompt) for name in models for prompt in prompts for _ in range(2)]
        for _ in range(2):  # the second time, beginnings come from the store
            done = await asyncio.gather(
                *(engine.sample(SampleRequest(prompt, GREEDY), Shaping(adapter=name)) for name, prompt in asked)
            )
            for (name, prompt), completion in zip(asked, done, strict=True):
                assert_greedy(models[name], prompt, completion)
        assert engine.stats().reused_tokens > 0
        assert len({completion.token_ids for completion in done}) == len(models) * len(prompts)
        with pytest.raises(ConfigError, match="there is no adapter 'other'"):
            await engine.sample(SampleRequest(LONG, GREEDY), Shaping(adapter="other"))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama-untied-biases"])
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", architecture)
    merged = make_adapter(tmp_path / "adapter", base, seed=3)
    engine = LocalEngine(
        local(base), dtype="fp32", device="cpu", context_tokens=256, adapters={"a": tmp_path / "adapter"}
    )
    async with engine:
        assert_greedy(merged, LONG, await engine.sample(SampleRequest(LONG, GREEDY), Shaping(adapter="a")))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"lora_alpha": float("nan")}, "type LORA"),
        ({"lora_alpha": "many"}, "holds no adapter"),
    ],
)
def test_an_adapter_that_does_more_than_is_computed_is_refused(
    change: dict[str, Any], complaint: str, plain: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path, plain, seed=1)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=complaint):
        make_decoder(plain).adapter("a", tmp_path)


def test_matrices_that_do_not_fit_are_refused(plain: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, plain, seed=1)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for damaged, complaint in (
        ({key: value for key, value in whole.items() if key != name}, "half"),
        (whole | {name: whole[name][:, :5].contiguous()}, "of another model"),
        (whole | {name: whole[name].to(torch.int8)}, "of another model"),
        (whole | {name.replace("layers.0", "layers.99"): whole[name].clone()}, "cannot be adapted"),
        (whole | {"base_model.model.lm_head.lora_A.weight": whole[name].clone()}, "cannot be adapted"),
    ):
        save_file(damaged, path)
        with pytest.raises(ModelError, match=complaint):
            make_decoder(plain).adapter("a", tmp_path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        make_decoder(plain).adapter("a", tmp_path)
    with pytest.raises(ModelError, match="holds no adapter"):
        make_decoder(plain).adapter("a", tmp_path / "nowhere")


def test_an_adapter_of_another_model_is_refused(plain: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", make_checkpoint(tmp_path / "wide", PLAIN, hidden_size=64), seed=1)
    with pytest.raises(ModelError, match="of another model"):
        make_decoder(plain).adapter("a", tmp_path / "a")
