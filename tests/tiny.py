"""A model small enough that a whole run takes seconds, an environment that it can learn, and runs of both.

The model is a random two-layer Llama over single characters. It answers nonsense; what can be learnt in `FirstDigit`
is to begin with a digit, which one reply in eight does by chance, so groups are mixed from the first step on.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from shoal.envs.base import Environment, Observation, Split, Step, check_cursor
from shoal.errors import TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task

CHARACTERS = string.digits + string.ascii_letters + " ?.,:;!+-*/=()'\n"
SPECIAL = ("<unk>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<user>' if m.role != 'assistant' else '<assistant>' }}{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

NUM_TASKS = 64


class FirstDigit(Environment):
    """A reply that begins with a digit earns 1."""

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        return Task(env=self.name, id=f"{split}-{index % NUM_TASKS}", seed=0)

    async def reset(self, task: Task) -> Observation:
        if not task.id.startswith(("train-", "heldout-")):
            raise TaskError(f"no such task: {task.id}.")
        return Observation((Message(role="user", content=f"{task.id.rpartition('-')[2]}?"),))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        right = float(action[:1].isdigit())
        return Step("", right, True, {"strict": right, "lenient": float(any(c.isdigit() for c in action))})


class Broken(FirstDigit):
    """An environment whose author made a mistake."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        raise ValueError("the author divided by a banana")


class Slow(FirstDigit):
    """An environment that takes its time over every step, also when the coordinator plays it again."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        import asyncio

        await asyncio.sleep(0.1)
        return await super().step(action, truncated=truncated)


class Stuck(FirstDigit):
    """An environment that never answers."""

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        import asyncio

        await asyncio.sleep(3600)
        return await super().step(action, truncated=truncated)


class TwoTurns(FirstDigit):
    """Two questions an episode; the reward is earned in parts."""

    _turn = 0

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        self._turn += 1
        right = float(action[:1].isdigit())
        return Step("again?" if self._turn == 1 else "", right / 2, self._turn == 2, {"strict": right})


def make_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    """A checkpoint in Hugging Face's layout, the same for the same seed."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=vocabulary["<end>"],
        bos_token_id=None,
        pad_token_id=vocabulary["<end>"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def make_wide_model(directory: Path) -> Path:
    """The same with heads of 32, the smallest that vLLM computes on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_model(directory)
    config = LlamaConfig.from_pretrained(directory)
    config.head_dim = 32
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def tiny_config(model: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """The tables of a configuration that finishes in seconds; `changes` replace keys: `learner__lr=0.1`."""
    tables: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(runs), "steps": 4},
        "model": {"name": str(model), "dtype": "fp32", "context_tokens": 64},
        "envs": {"digit": {"type": "tiny:FirstDigit"}},
        "rollout": {"group_size": 4, "groups_per_step": 3, "max_tokens": 8, "lease_timeout_s": 10.0},
        "learner": {"mode": "async", "max_staleness": 2, "lr": 3e-3, "device": "cpu", "checkpoint_every": 2},
        "workers": {"count": 2, "max_sequences": 16, "cache_tokens": 2048, "device": "cpu"},
        "eval": {"questions": 16, "max_tokens": 8},
        "output": {"plots": False},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    if tables["learner"].get("mode") != "async":
        tables["learner"].pop("max_staleness", None)
    return tables


def write_config(path: Path, tables: dict[str, Any]) -> Path:
    """The tables as a TOML file."""
    import tomli_w

    path.write_text(tomli_w.dumps(tables))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory. Import this fixture into a folder's `conftest.py` to use it there."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
