"""Tiny random checkpoints of every supported kind, a tokenizer for them, and `transformers` as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from shoal.engine import tokenizer as engine_tokenizer
from shoal.engine.batching import Batcher
from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.sequence import Sequence as Running
from shoal.engine.source import LocalModel
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END, IM_START, IM_END = 0, 1, 2
VOCABULARY = len(CONTROL) + 256 + 20
"""Bytes, control tokens, a few merges, and some ids that no text gives."""

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("l", "l"), ("o", "w"), ("a", "n")]

SMOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
    "pad_token_id": IM_END,
    # Large enough that a random model has preferences.
    "initializer_range": 0.15,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped-tied": ("llama", {}),
    "llama-untied-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-every-head-its-own": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied-yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-untied-one-key-head": ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": False}),
}

PLAIN = "llama-grouped-tied"


def make_tokenizer(template: str = SMOL_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like those of Llama 3, Qwen and SmolLM, with a handful of merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [left + right for left, right in MERGES]
    vocabulary = {piece: index for index, piece in enumerate([*CONTROL, *letters, *merged])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


def make_checkpoint(directory: Path, architecture: str = PLAIN, *, seed: int = 0, **changes: Any) -> Path:
    """A random model of a kind, in Hugging Face's layout; the same for the same seed."""
    kind, own = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(kind, **{**BASE, **own, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif name.endswith("bias"):
                tensor.normal_(std=0.5)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def local(directory: Path) -> LocalModel:
    return LocalModel(directory.name, directory)


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """`transformers`' own model of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """fp32 logits after each of the ids, [T, V]."""
    logits: Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return logits


def make_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = local(directory)
    decoder = Decoder(model.config(), dtype, torch.device("cpu"))
    decoder.load(model.tensors())
    return decoder


def make_cache(decoder: Decoder, slots: int = 16, tokens: int = 4096) -> KVCache:
    arch = decoder.arch
    token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * decoder.dtype.itemsize
    return KVCache(
        arch.num_layers,
        arch.num_kv_heads,
        arch.head_dim,
        slots,
        tokens * token_bytes,
        decoder.dtype,
        torch.device("cpu"),
    )


def make_batcher(
    directory: Path, *, slots: int = 16, tokens: int = 4096, context: int = 256, endless: bool = False
) -> Batcher:
    """A batcher in fp32; `endless` takes away the end tokens, so that completions have the asked length."""
    decoder = make_decoder(directory)
    tokenizer = engine_tokenizer.Tokenizer(directory)
    if endless:
        tokenizer.end_ids = frozenset()
    return Batcher(decoder, tokenizer, make_cache(decoder, slots, tokens), context)


class Caller:
    """Someone who asks a batcher for completions and keeps what comes back."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.done: dict[int, Completion] = {}
        self.running: list[Running] = []

    def ask(self, prompt: Sequence[int], *, min_version: int = 0, **params: Any) -> int:
        """Queue a request; gives its number."""
        number = len(self.running)
        request = SampleRequest(tuple(prompt), SamplingParams(**params), min_version=min_version)
        self.batcher.check(request)

        def on_done(completion: Completion) -> None:
            assert number not in self.done, "completed twice"
            self.done[number] = completion

        self.running.append(Running(request, on_done))
        self.batcher.waiting.append(self.running[-1])
        return number

    def run(self, most_steps: int = 1000) -> dict[int, Completion]:
        """Step until there is nothing to do."""
        for _ in range(most_steps):
            if not self.batcher.step():
                return self.done
        raise AssertionError(f"not done after {most_steps} steps")


def alone(directory: Path, prompt: Sequence[int], **params: Any) -> Completion:
    """The completion of a request that has the engine to itself."""
    caller = Caller(make_batcher(directory, endless=True))
    number = caller.ask(prompt, **params)
    return caller.run()[number]


def assert_same_draws(model: Any, prompt: Sequence[int], one: Completion, other: Completion, uniforms: bool) -> None:
    """The same tokens, up to a near-tie: there either token is right, and everything after it may differ.

    Args:
        uniforms: sampled, not greedy: a draw may then fall differently where it hits a border between two tokens.
    """
    for at, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
        if a == b:
            continue
        logits = reference_logits(model, [*prompt, *one.token_ids[:at]])[-1]
        if uniforms:
            # Inversion goes through the tokens in the order of their ids: only neighbours share a border.
            mass = torch.softmax(logits.double(), -1).cumsum(-1)
            low, high = sorted((a, b))
            assert mass[high - 1] - mass[low] < 1e-3, f"token {at}: {a} against {b} is no near-tie"
        else:
            assert abs(float(logits[a] - logits[b])) < 1e-3, f"token {at}: {a} against {b} is no near-tie"
        return
