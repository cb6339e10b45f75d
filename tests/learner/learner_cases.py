"""Tiny random models and episodes that the learner's tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shoal.protocol.episode import Episode, Outcome, Task, Turn
from shoal.protocol.sampling import Completion, FinishReason

VOCAB = 97


def tiny_model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random two-layer model with grouped-query attention."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{key: value for key, value in shape.items() if key != "head_dim"}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False))
    return model.to(dtype)


def completion(
    ids: Sequence[int], rng: random.Random, *, version: int = 0, finish: FinishReason = "stop"
) -> Completion:
    """A completion whose log-probabilities are far from any model's."""
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(-rng.uniform(0.5, 8.0) for _ in ids),
        versions=tuple(version + (k > len(ids) // 2) for k in range(len(ids))),
        finish=finish,
        text="",
    )


def episode(
    group: str,
    index: int,
    turns: Sequence[Turn],
    reward: float,
    *,
    outcome: Outcome = "done",
    temperature: float = 1.0,
) -> Episode:
    """One episode with the fields nobody here looks at filled in."""
    return Episode(
        id=f"{group}-{index}",
        group=group,
        index=index,
        task=Task(env="test", id=group, seed=1),
        turns=tuple(turns),
        outcome=outcome,
        reward=reward,
        temperature=temperature,
    )


def random_ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, VOCAB) for _ in range(count))


def random_episodes(
    seed: int = 0,
    *,
    groups: int = 3,
    size: int = 4,
    max_prompt: int = 9,
    max_response: int = 7,
    max_turns: int = 1,
    temperature: float = 1.0,
    version: int = 0,
) -> list[Episode]:
    """Ragged groups of episodes that share their first context, of one or more turns."""
    rng = random.Random(seed)
    found = []
    for g in range(groups):
        prompt = random_ids(rng, rng.randint(1, max_prompt))
        for index in range(size):
            turns = []
            for number in range(rng.randint(1, max_turns)):
                context = prompt if number == 0 else random_ids(rng, rng.randint(1, 4))
                drawn = random_ids(rng, rng.randint(1, max_response))
                turns.append(
                    Turn(context_ids=context, observation="", completion=completion(drawn, rng, version=version))
                )
            found.append(episode(f"g{g}", index, turns, rng.choice([0.0, 0.5, 1.0]), temperature=temperature))
    return found
