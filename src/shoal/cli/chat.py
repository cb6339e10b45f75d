"""`shoal chat`: talk to a model in the terminal, or ask it one question."""

from __future__ import annotations

import asyncio
import sys

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json


def run(
    model: str = "embedded",
    /,
    *,
    message: str = "",
    system: str = "",
    temperature: float = 0.0,
    max_tokens: int = 256,
    threads: int = 1,
    draft: str = "",
    json: Json = False,
) -> None:
    """Talk to a model. Ends with Ctrl-D.

    For example:

        shoal chat
        shoal chat runs/NAME/model --message "What is 7 + 8?"

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        message: Ask this one thing and leave.
        system: What the model is told first.
        temperature: 0 always takes the likeliest token.
        max_tokens: Longest answer.
        threads: CPU threads.
        draft: Speculate, losslessly: ngram, a head's folder, or a smaller model with the same tokenizer.
    """
    asyncio.run(_talk(model, message, system, temperature, max_tokens, threads, draft, json))


async def _talk(
    name: str,
    message: str,
    system: str,
    temperature: float,
    max_tokens: int,
    threads: int,
    draft: str,
    as_json: bool,
) -> None:
    from shoal.config import Serving
    from shoal.config.speculation import Speculation
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.errors import CapacityError, ConfigError
    from shoal.protocol.chat import Message
    from shoal.protocol.sampling import SampleRequest, SamplingParams
    from shoal.rollout.host import model_cache
    from shoal.serving.speculation import NGRAM, speculations

    if as_json and not message:
        raise ConfigError("--json answers one question.", "Give it with --message.")
    model = await asyncio.to_thread(resolve, name, model_cache(), note)
    context = model.config().max_position_embeddings
    out = console()
    said: list[Message] = [Message(role="system", content=system)] if system else []
    drafter = None if draft in ("", NGRAM) else await asyncio.to_thread(resolve, draft, model_cache(), note)
    speculate = speculations(model, Serving(speculation=Speculation(draft=draft)), drafter)
    async with LocalEngine(
        model,
        threads=threads,
        max_sequences=1,
        context_tokens=context,
        speculation=speculate(1, context) if speculate else None,
    ) as engine:
        while True:
            question = message or await asyncio.to_thread(_ask)
            if not question:
                return
            said.append(Message(role="user", content=question))
            prompt = tuple(engine.tokenizer.prompt(said))
            request = SampleRequest(
                prompt_ids=prompt, params=SamplingParams(max_tokens=max_tokens, temperature=temperature)
            )
            answer = ""
            try:
                async for piece in engine.stream(request):
                    answer += piece
                    if not as_json:
                        out.print(piece, end="", markup=False, soft_wrap=True)
            except CapacityError as error:
                note(str(error))
                return
            if as_json:
                print_json({"model": name, "message": question, "answer": answer})
                return
            out.print()
            if message:
                return
            said.append(Message(role="assistant", content=answer))


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
