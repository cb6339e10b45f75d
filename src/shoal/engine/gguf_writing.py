"""A checkpoint as a GGUF file, for llama.cpp and what is built on it.

Tensors get llama.cpp's names; of Llama-type models, query and key matrices are turned, since llama.cpp pairs
neighbouring coordinates where Hugging Face pairs halves (Qwen's are left). Byte-level BPE tokenizers are written with
their merges, kinds of tokens and chat template.

Invariants: what can be read back by `resolve` is the same model, values to the type that was asked for; a file appears
under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from torch import Tensor

from shoal.engine.source import LocalModel
from shoal.errors import ModelError, StorageError

Kind = Literal["bf16", "f16", "f32", "q8_0"]
KINDS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` -> llama.cpp's name."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    model: LocalModel, path: Path, kind: Kind = "bf16", progress: Callable[[int, int], None] = lambda *_: None
) -> int:
    """Write a checkpoint to `path`, which must not be there; gives its bytes.

    Args:
        progress: told of tensors done, and of how many there are.

    Raises:
        ModelError: the architecture or the tokenizer has no form in GGUF that is known here.
        StorageError: the file is there already, or cannot be written.
    """
    config = model.config()
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"a model of type '{config.model_type}' has no GGUF form here.", f"Supported: {known}.")
    if path.exists():
        raise StorageError(f"{path} is there already.", "Remove it, or give another name.")
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(str(made), architecture)
        _describe(writer, model, config, kind)
        tokens = _add_tokenizer(writer, model.directory, config)
        writer.add_vocab_size(tokens)
        tensors = model.tensors()
        for done, (name, tensor) in enumerate(tensors.items(), start=1):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            _add_tensor(writer, name, tensor, config, kind)
            progress(done, len(tensors))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(made, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.", "Free some space.") from None
    finally:
        with suppress(OSError):  # on a disk that is read-only not even that can be done
            made.unlink(missing_ok=True)
    return path.stat().st_size


def _describe(writer: gguf.GGUFWriter, model: LocalModel, config: Any, kind: Kind) -> None:
    writer.add_name(model.name[:200])
    writer.add_file_type(KINDS[kind][1])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope: Mapping[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rotary embeddings of type '{rope['rope_type']}' have no GGUF form here.")


def head_width(config: Any) -> int:
    """Coordinates of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, config: Any, kind: Kind) -> None:
    stem, dot, leaf = name.rpartition(".")
    if stem in OUTER:
        short = OUTER[stem]
    else:
        parts = stem.split(".", 3)
        if len(parts) != 4 or parts[:2] != ["model", "layers"] or parts[3] not in INNER:
            raise ModelError(f"tensor '{name}' has no name in GGUF that is known here.")
        short = f"blk.{parts[2]}.{INNER[parts[3]]}"
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if parts[3] in heads and ARCHITECTURES[config.model_type] == "llama":
            tensor = _turned(tensor, heads[parts[3]])
    quantisation = KINDS[kind][0] if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
    values = tensor.to(torch.float32).contiguous().numpy()
    if quantisation == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        quantisation = gguf.GGMLQuantizationType.F16  # Its blocks hold 32 values.
    writer.add_tensor(f"{short}{dot}{leaf}", gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)


def _turned(tensor: Tensor, heads: int) -> Tensor:
    """Halves of each head's rows, interleaved."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: Any) -> int:
    """Write the tokenizer; gives the number of tokens, padded to the embedding's rows."""
    try:
        table = json.loads((directory / "tokenizer.json").read_bytes())
    except (OSError, ValueError):
        raise ModelError(f"{directory} has no tokenizer.json that can be read.") from None
    vocabulary = table["model"].get("vocab", {})
    if table["model"].get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise ModelError("the tokenizer is no byte-level BPE; only these have a GGUF form here.")
    names = {number: token for token, number in vocabulary.items()}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for added in table.get("added_tokens", []):
        names[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
    count = max(config.vocab_size, max(names) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(table, config))
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(count)])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(count)])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in table["model"].get("merges", [])]
    writer.add_token_merges(merges)
    for what in ("bos", "eos", "pad", "unk"):
        number = getattr(config, f"{what}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            getattr(writer, f"add_{what}_token_id")(number)
    if (template := _template(directory)) is not None:
        writer.add_chat_template(template)
    return count


def pre_tokenizer(table: Mapping[str, Any], config: Any) -> str:
    """llama.cpp's name for how text is cut before merging; it knows these by name only."""
    rules = json.dumps(table.get("pre_tokenizer") or {})
    if config.model_type.startswith("qwen"):
        return "qwen2"
    if "{1,3}" in rules:
        return "llama-bpe"
    return "smollm" if "Digits" in rules or config.vocab_size == 49152 else "default"


def _template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        found = json.loads((directory / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
