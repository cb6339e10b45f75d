"""Post-training in four verbs, in one process, for whoever writes the loop: sample, forward_backward, optim_step, save.

    async with Tuner("embedded", config.learner) as tuner:
        completions = await tuner.sample(requests)
        tuner.forward_backward(episodes)
        await tuner.optim_step()
    tuner.save(folder)

Invariants: `sample` draws under the weights that `optim_step` left, and its completions say so (`versions`); what
`forward_backward` gathers, the next `optim_step` applies, once; the two never run at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from shoal.config.learner import ColocatedLearner, Learner
from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import to_views
from shoal.learner.loading import load_policy
from shoal.learner.optimizer import OptimizerStep
from shoal.learner.trainer import PassResult, Trainer
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion, SampleRequest
from shoal.rollout.host import model_cache


class Tuner:
    """A policy that samples and learns.

    Args:
        model: `embedded`, a directory, a .gguf file or a hub name.
        settings: the `[learner]` table; by default full fine-tuning with GRPO.
        total_steps: needed where the learning rate falls towards its end.
        engine: further arguments of `LocalEngine`, such as `max_sequences` and `context_tokens`.

    Raises:
        ModelError: the model can't be had, or can't be trained.
    """

    def __init__(
        self,
        model: str = "embedded",
        settings: Learner | None = None,
        *,
        dtype: Literal["bf16", "fp32"] = "bf16",
        total_steps: int = 0,
        **engine: Any,
    ) -> None:
        settings = settings or ColocatedLearner()
        local = resolve(model, model_cache())
        self.tokenizer = Tokenizer(local.directory)
        policy = load_policy(local, dtype, settings.device)
        self.trainer = Trainer(policy, settings, total_steps=total_steps, tokenizer=self.tokenizer)
        self.engine = LocalEngine(local, dtype=dtype, device=settings.device, threads=settings.threads, **engine)
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()

    @property
    def version(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.version

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation, for a `SampleRequest`."""
        return tuple(self.tokenizer.prompt(messages))

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Complete all requests together."""
        async with self._turn:
            return list(await asyncio.gather(*(self.engine.sample(request) for request in requests)))

    def forward_backward(self, episodes: Sequence[Episode]) -> PassResult:
        """Add the gradients of the loss of whole groups of episodes to what `optim_step` will apply."""
        return self.trainer.forward_backward(self.trainer.batch(episodes))

    async def optim_step(self) -> OptimizerStep:
        """Apply the gradients and sample from the new weights from here on; the version rises in any case."""
        async with self._turn:
            outcome = await asyncio.to_thread(self.trainer.optim_step)
            await self.engine.load_weights(self.trainer.version, to_views(self.trainer.tensors()))
        return outcome

    def save(self, directory: Path) -> None:
        """The policy in Hugging Face's format, tokenizer included."""
        self.trainer.save_pretrained(directory, self.tokenizer.hf)


def episode(group: str, index: int, request: SampleRequest, completion: Completion, reward: float) -> Episode:
    """One completion with its reward, as `forward_backward` takes it: those of one group are compared."""
    turn = Turn(context_ids=request.prompt_ids, observation="", completion=completion, grammar=request.grammar)
    return Episode(
        id=f"{group}/{index}",
        group=group,
        index=index,
        task=Task(env="own", id=group, seed=0),
        turns=(turn,),
        outcome="done",
        reward=reward,
        temperature=request.params.temperature,
    )
