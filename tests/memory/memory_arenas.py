"""Arenas to test with: a world of the tests, and a sampler that reads its prompt.

`Obedient` begins with a digit where the prompt says "digit", with a letter where it says "letter", and tosses a coin by
its seed where it says neither: so a memory that says "digit" helps by one half, and one that says "letter" harms.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from shoal.engine.tokenizer import Tokenizer
from shoal.envs.registry import make
from shoal.memory.records import Entry, Provenance, World
from shoal.memory.trials import Arena
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams

FAMILY = "digit"
HELPS = "Begin every reply with a digit, and then go on."
HARMS = "Begin every reply with a letter, and then go on."
NOTHING = "The weather was fine when this was written down."


@dataclass
class Obedient:
    """A sampler that does what the prompt says."""

    tokenizer: Tokenizer
    takes_s: float = 0.0
    lies: bool = False
    prompts: list[str] = field(default_factory=list)

    async def sample(self, request: SampleRequest) -> Completion:
        await asyncio.sleep(self.takes_s)
        prompt = self.tokenizer.decode(request.prompt_ids)
        self.prompts.append(prompt)
        coin = (request.params.seed or 0) // 7 % 2
        text = "7" if "digit" in prompt else "a" if "letter" in prompt else "1a"[coin]
        ids = tuple(self.tokenizer.encode(text))
        zeros = tuple(0 for _ in ids)
        return Completion(
            token_ids=ids, logprobs=tuple(map(float, zeros)), versions=zeros, finish="stop", text=text
        )  # fmt: skip


def make_arena(model: Path, *, takes_s: float = 0.0, weights: str = "weights", temperature: float = 0.0) -> Arena:
    tokenizer = Tokenizer(model)
    world = World(kind="tiny:FirstDigit")
    env = make(world.kind, {}, name=FAMILY)
    params = SamplingParams(max_tokens=4, temperature=temperature)
    return Arena(world, env, Obedient(tokenizer, takes_s), tokenizer, params, 1024, weights)


def advice(text: str, *, node: str = "") -> Entry:
    return Entry(text=text, family=FAMILY, source_task="train-0", provenance=Provenance(rule="manual", node=node))
