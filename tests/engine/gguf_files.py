"""GGUF files of tiny Llama checkpoints, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from engine_cases import CONTROL, MERGES, SMOL_TEMPLATE
from safetensors.torch import load_file
from torch import Tensor

STEMS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NORMAL, CONTROL_TYPE = 1, 3


def write_gguf(path: Path, checkpoint: Path, *, quantised: bool = False) -> dict[str, Tensor]:
    """Write a checkpoint as GGUF; gives the tensors that a reader should find, by their Hugging Face names."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, checkpoint, config["vocab_size"])
    found = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        layer = part = ""
        if stem not in STEMS:
            _, _, layer, part = stem.split(".", 3)
        turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(part, 0)
        values = tensor.float()
        if turned:  # llama.cpp pairs neighbouring coordinates where Hugging Face pairs halves
            values = values.view(turned, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        stored = values.contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(stored, kind)
        writer.add_tensor(f"{STEMS[stem] if not part else f'blk.{layer}.{PARTS[part]}'}.weight", packed, raw_dtype=kind)
        back = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
        if turned:
            back = back.view(turned, -1, 2, back.shape[1]).transpose(1, 2).reshape(back.shape)
        found[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, vocabulary: int) -> None:
    ids = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    tokens += [f"<unused{index}>" for index in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TYPE if token in CONTROL else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(SMOL_TEMPLATE)
