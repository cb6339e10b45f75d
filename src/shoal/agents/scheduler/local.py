"""A model in this process, or any other `Sampler`, as a policy.

Invariant: each decision is drawn under a grammar made from the run's own tools, so it parses, names a tool that there
is, and (where the cards' schemas can be used as grammars) has arguments of the right types. What a grammar cannot
prevent, a reply cut off by the token limit or a number beyond a float's range, is told to the model as a decision that
could not be used.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal.agents.scheduler.decision import Form, decision_schema, parse
from shoal.agents.scheduler.policy import Decided, PolicyError, View
from shoal.agents.scheduler.prompt import messages
from shoal.agents.scheduler.records import Spent
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError, ConfigError, ModelError
from shoal.protocol.sampling import Grammar, Sampler, SampleRequest, SamplingParams

GREEDY = SamplingParams(max_tokens=256, temperature=0.0)


@dataclass(frozen=True)
class SamplerPolicy:
    """Draws decisions from a sampler."""

    sampler: Sampler
    tokenizer: Tokenizer
    params: SamplingParams = GREEDY
    form: Form = "brief"

    async def decide(self, view: View) -> Decided:
        """The next decision; raises `PolicyError` where the sampler can draw none."""
        prompt = tuple(self.tokenizer.prompt(messages(view, self.form)))
        schema = decision_schema(view.cards, self.form, must_answer=bool(view.must_answer))
        grammar = Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())
        try:
            completion = await self.sampler.sample(
                SampleRequest(prompt_ids=prompt, params=self.params, grammar=grammar)
            )
        except (CapacityError, ConfigError, ModelError) as error:
            raise PolicyError(f"the model draws no decision: {error.problem}", error.remedy) from None
        spent = Spent(tokens_in=len(prompt), tokens_out=len(completion.token_ids))
        if completion.finish != "stop":
            return Decided(None, f"the reply was cut off ({completion.finish}) after {spent.tokens_out} tokens", spent)
        decision, problem = parse(completion.text)
        return Decided(decision, problem, spent)
