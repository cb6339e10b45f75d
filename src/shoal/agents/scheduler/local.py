"""A model in this process, or any other `Sampler`, as a policy.

Invariant: each decision is drawn under a grammar made from the run's own tools, so it parses, names a tool that there
is, and (where the cards' schemas can be used as grammars) has arguments of the right types. What a grammar cannot
prevent, a reply cut off by the token limit or a number beyond a float's range, is told to the model as a decision that
could not be used. A recorded run's tokens are those that were drawn: none is tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal.agents.scheduler.decision import Form, decision_schema, parse
from shoal.agents.scheduler.policy import ContextFull, Decided, PolicyError, View
from shoal.agents.scheduler.prompt import PROMPT_CHARS, messages, news
from shoal.agents.scheduler.records import Drawn, Spent
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import CapacityError, ConfigError, ModelError
from shoal.protocol.episode import Turn
from shoal.protocol.sampling import Grammar, Sampler, SampleRequest, SamplingParams

MIN_PROMPT_CHARS = 2000
"""With less, a task is not told any more."""

GREEDY = SamplingParams(max_tokens=256, temperature=0.0)


@dataclass(frozen=True)
class SamplerPolicy:
    """Draws decisions from a sampler."""

    sampler: Sampler
    tokenizer: Tokenizer
    params: SamplingParams = GREEDY
    form: Form = "brief"
    prompt_chars: int = PROMPT_CHARS
    """Of what a run that is not recorded is told; halved as often as it takes to fit into the model."""

    async def decide(self, view: View) -> Decided:
        """The next decision; raises `PolicyError` where the sampler can draw none."""
        schema = decision_schema(view.cards, self.form, must_answer=bool(view.must_answer))
        grammar = Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())
        chars = self.prompt_chars
        while True:
            before: list[int] = []
            try:
                before, context, shown = self._conversation(view, chars)
                prompt = (*before, *context)
                request = SampleRequest(prompt_ids=prompt, params=self.params, grammar=grammar)
                completion = await self.sampler.sample(request)
                break
            except CapacityError as error:
                if before or chars < MIN_PROMPT_CHARS:
                    raise ContextFull(f"the conversation is too long for the model: {error.problem}") from None
                chars //= 2  # Less of it is told.
            except (ConfigError, ModelError) as error:
                raise PolicyError(f"the model draws no decision: {error.problem}", error.remedy) from None
        spent = Spent(tokens_in=len(prompt), tokens_out=len(completion.token_ids))
        drawn = None
        if view.record:
            turn = Turn(context_ids=tuple(context), observation=shown, completion=completion, grammar=grammar)
            drawn = Drawn(turn=turn, temperature=self.params.temperature)
        if completion.finish != "stop":
            words = f"the reply was cut off ({completion.finish}) after {spent.tokens_out} tokens"
            return Decided(None, words, spent, drawn)
        decision, problem = parse(completion.text)
        return Decided(decision, problem, spent, drawn)

    def _conversation(self, view: View, chars: int) -> tuple[list[int], list[int], str]:
        """The tokens so far, those that come now, and these as text.

        A run that is recorded keeps its whole conversation token by token, and ends where the context is full; any
        other is written anew each time, its oldest steps left out.
        """
        drawn = [step.drawn for step in view.steps if step.drawn is not None]
        if not view.record or not drawn:
            said = messages(view, self.form, chars)
            return [], self.tokenizer.prompt(said), said[-1].content
        before = [one for draw in drawn for one in (*draw.turn.context_ids, *draw.turn.completion.token_ids)]
        shown = news(view)
        return before, self.tokenizer.continuation(drawn[-1].turn.completion.token_ids, shown), shown
