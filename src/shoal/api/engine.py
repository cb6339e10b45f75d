"""A model in this process, asked by plain calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.api._background import Kept, wait
from shoal.cli.output import note
from shoal.errors import ConfigError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Completion, Grammar, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from shoal.engine.local import LocalEngine
    from shoal.engine.tokenizer import Tokenizer

Said = str | Sequence[Message] | Sequence[Mapping[str, str]]
"""One question, or a conversation: messages, or `{"role": …, "content": …}`."""

ANSWER_TOKENS = 512
"""The longest answer where none was asked for."""


class Engine:
    """A model in this process. Close it, or use it as a context.

    Examples:
        ```python
        import shoal

        with shoal.Engine("embedded") as engine:
            print(engine.chat("What is 7 + 8?").text)
            for piece in engine.stream("Count to five."):
                print(piece, end="")
        ```
    """

    def __init__(
        self,
        model: str | Path = "embedded",
        *,
        dtype: str = "bf16",
        device: str = "auto",
        threads: int = 1,
        context_tokens: int | None = None,
        max_sequences: int = 64,
    ) -> None:
        """
        Args:
            model: embedded, a directory, a .gguf file or a hub name.
            dtype: bf16, fp16 or fp32.
            device: auto, cpu, cuda or cuda:N.
            threads: CPU threads.
            context_tokens: longest prompt and answer together; absent: what the model was made for.
            max_sequences: answered at once.

        Raises:
            ModelError: the model cannot be had or loaded.
        """
        self.model = str(model)
        self._kept = Kept(_opened(str(model), dtype, device, threads, context_tokens, max_sequences))

    @property
    def local(self) -> LocalEngine:
        """The engine itself, a `Sampler` whose coroutines belong to the background's loop."""
        return self._kept.value

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        return self.local.tokenizer

    def chat(
        self,
        said: Said,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The answer, with its tokens and their log-probabilities.

        Args:
            said: a question, or a conversation that ends with one.
            max_tokens: longest answer; absent: what the context has left, at most `ANSWER_TOKENS`.
            temperature: 0 always takes the likeliest token.
            seed: of the sampling; absent: another one each time.
            stop: texts that end the answer.
            schema: a JSON schema that the answer must match.

        Raises:
            CapacityError: it does not fit into the model's context.
        """
        return self.chat_many(
            [said], max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop, schema=schema
        )[0]

    def chat_many(
        self,
        said: Sequence[Said],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answers to many conversations, decoded together; arguments as `chat` takes them."""
        params = SamplingParams(temperature=temperature, seed=seed, stop=tuple(stop))
        requests = [self._request(one, max_tokens, params, schema) for one in said]

        async def answers() -> list[Completion]:
            import asyncio

            return await asyncio.gather(*(self.local.sample(request) for request in requests))

        return wait(answers())

    def stream(self, said: Said, *, max_tokens: int | None = None, temperature: float = 0.0) -> Iterator[str]:
        """The answer's text in pieces, as they are drawn."""
        pieces = self.local.stream(self._request(said, max_tokens, SamplingParams(temperature=temperature), None))

        async def following() -> str | None:
            return await anext(pieces, None)

        while (piece := wait(following())) is not None:
            yield piece

    def _request(
        self, said: Said, max_tokens: int | None, params: SamplingParams, schema: Mapping[str, Any] | None
    ) -> SampleRequest:
        grammar = None
        if schema is not None:
            grammar = Grammar(kind="json_schema", text=msgspec.json.encode(dict(schema)).decode())
        prompt = self.tokenizer.prompt(_messages(said))
        if max_tokens is None:
            max_tokens = max(1, min(ANSWER_TOKENS, self.local.context_tokens - len(prompt)))
        params = msgspec.structs.replace(params, max_tokens=max_tokens)
        request = SampleRequest(prompt_ids=tuple(prompt), params=params, grammar=grammar)
        request.check()
        return request

    def close(self) -> None:
        """Let go of the model; a second time does nothing."""
        self._kept.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _messages(said: Said) -> list[Message]:
    if isinstance(said, str):
        return [Message(role="user", content=said)]
    try:
        return [one if isinstance(one, Message) else msgspec.convert(dict(one), Message) for one in said]
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"this is no conversation: {error}.", 'Give {"role": …, "content": …} for each.') from None


@asynccontextmanager
async def _opened(
    name: str, dtype: str, device: str, threads: int, context_tokens: int | None, max_sequences: int
) -> AsyncIterator[LocalEngine]:
    import asyncio

    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    model = await asyncio.to_thread(resolve, name, model_cache(), note)
    context = context_tokens or int(model.config().max_position_embeddings)
    engine = await asyncio.to_thread(
        LocalEngine,
        model,
        dtype=dtype,
        device=device,
        threads=threads,
        context_tokens=context,
        max_sequences=max_sequences,
    )
    async with engine:
        yield engine
