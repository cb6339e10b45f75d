"""`run_episode`: one task, one sampler, one environment, from reset to the last reward.

Invariants: the token sequence is what was sampled (`protocol.episode`); a fault of the sampler or of the environment
gives a `void` episode that says why; the environment is closed whatever happens.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import Environment
from shoal.errors import ShoalError
from shoal.protocol.episode import MAX_TURNS, Episode, Outcome, Task, Turn
from shoal.protocol.sampling import Completion, Sampler, SampleRequest, SamplingParams
from shoal.rollout.session import SEED_STRIDE

log = logging.getLogger("shoal.rollout")

MAX_REASON_CHARS = 1000


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode to run: identity, task, and how to sample."""

    id: str
    group: str
    index: int
    task: Task
    params: SamplingParams
    """Its seed is the episode's; each turn derives its own."""
    min_version: int = 0
    worker: str = ""


async def run_episode(
    spec: EpisodeSpec,
    sampler: Sampler,
    tokenizer: Tokenizer,
    env: Environment,
    *,
    context_tokens: int,
) -> Episode:
    """Act until the environment is done, the context is full, or something breaks.

    Args:
        env: a fresh instance; closed here.
        context_tokens: the sequence, prompt and completions together, may not be longer.
    """
    started = time.time()
    turns: list[Turn] = []
    reward, parts, reason = 0.0, {}, ""
    outcome: Outcome = "done"
    used = 0
    try:
        env.rollout_seed = spec.params.seed or 0
        first = await env.reset(spec.task)
        context = tokenizer.prompt(first.messages)
        shown, grammar, given = first.messages[-1].content, first.grammar, first.given
        sequence: list[int] = []
        while len(turns) < MAX_TURNS:
            sequence += context
            used = len(sequence)
            room = min(spec.params.max_tokens, context_tokens - used)
            if room < 1:
                if not turns:
                    raise ShoalError(f"the task's prompt has {used} tokens, and the context is {context_tokens}.")
                break
            seed = None if spec.params.seed is None else (spec.params.seed + SEED_STRIDE * len(turns)) % 2**63
            params = replace(spec.params, max_tokens=room, seed=seed)
            if given is not None:
                completion = _as_drawn(given, tokenizer, spec.min_version)
                if (length := len(completion.token_ids)) > context_tokens - used:
                    raise ShoalError(f"a given act has {length} tokens, which do not fit behind {used}.")
            else:
                request = SampleRequest(
                    prompt_ids=tuple(sequence), params=params, min_version=spec.min_version, grammar=grammar
                )
                completion = await sampler.sample(request)
            if completion.finish in ("cancelled", "error"):
                raise ShoalError(f"sampling ended with '{completion.finish}'.")
            turns.append(
                Turn(
                    context_ids=tuple(context),
                    observation=shown,
                    completion=completion,
                    grammar=grammar,
                    given=given is not None,
                )
            )
            step = await env.step(completion.text, truncated=completion.finish == "length")
            reward += step.reward
            parts = step.info
            if step.done:
                break
            sequence += completion.token_ids
            context = tokenizer.continuation(completion.token_ids, step.observation)
            shown, grammar, given = step.observation, step.grammar, step.given
    except (ShoalError, OSError, TimeoutError) as error:
        # Surviving here is the feature: infrastructure's failure is told apart from the agent's.
        outcome, reason = "void", str(error)[:MAX_REASON_CHARS] or type(error).__name__
    except Exception as error:
        log.exception("environment '%s' failed in task %s", spec.task.env, spec.task.id)
        outcome, reason = "void", f"{type(error).__name__} in environment '{spec.task.env}': {error}"[:MAX_REASON_CHARS]
    finally:
        await _close(env, spec.task.env)
    return Episode(
        id=spec.id,
        group=spec.group,
        index=spec.index,
        task=spec.task,
        turns=tuple(turns),
        outcome=outcome,
        reward=reward if outcome == "done" else 0.0,
        reward_parts=dict(parts) if outcome == "done" else {},
        void_reason=reason,
        temperature=spec.params.temperature,
        worker=spec.worker,
        started_at=started,
        finished_at=time.time(),
    )


def _as_drawn(text: str, tokenizer: Tokenizer, version: int) -> Completion:
    """An act that the environment gives, as the tokens that the agent would have drawn."""
    ids = (*tokenizer.encode(text), tokenizer.end_of_turn)
    return Completion(
        token_ids=ids,
        logprobs=(0.0,) * len(ids),
        versions=(version,) * len(ids),
        finish="stop",
        text=tokenizer.visible(ids, ()),
    )


async def _close(env: Environment, name: str) -> None:
    try:
        await env.close()
    except Exception:
        log.exception("environment '%s' could not be closed", name)
