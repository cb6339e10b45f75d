"""Text to token ids once, token ids to text whenever people want to read: chat template, continuation, stop strings.

Invariants: an agent's own tokens are never re-encoded: a conversation's first prompt is rendered by the chat template;
what follows an act is only the template's *continuation* (end of the assistant's turn, the new observation, the next
assistant header), appended to the token ids that were really sampled. And text stays text: a control token's name that
somebody writes in a message is encoded letter by letter; only the template's own control tokens are tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.protocol.chat import Message

_ACT = "\u241eACT\u241e"
"""Stands where the assistant's own tokens go when the template's continuation is cut out."""

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What `transformers` raises for files that are missing or not what they should be."""

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points without a meaning, one of which stands for each control token's name while a template is rendered."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Args:
        directory: holds `tokenizer.json` and its configuration.

    Raises:
        ModelError: it holds no usable tokenizer or configuration.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(directory), **place)
            config = AutoConfig.from_pretrained(str(directory), **place)
            ends = _as_set(getattr(config, "eos_token_id", None)) | _as_set(self._inner.eos_token_id)
            if (directory / "generation_config.json").exists():
                ends |= _as_set(GenerationConfig.from_pretrained(str(directory), local_files_only=True).eos_token_id)
        except Exception as error:
            # For a damaged file `tokenizers` raises Exception itself, which nothing narrower would catch.
            if type(error) is not Exception and not isinstance(error, _DAMAGED):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(
                f"no usable tokenizer in {directory}: {reason}.", "The checkpoint is incomplete or damaged."
            ) from None
        self.hf = self._inner
        self.end_ids = frozenset(ends)
        added = self._inner.added_tokens_decoder.items()
        self._control = {token.content: index for index, token in added if token.special or index in ends}
        names = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @property
    def vocab_size(self) -> int:
        return len(self._inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens written in it are not interpreted."""
        return list(self._inner.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next.

        Raises:
            ModelError: the model's chat template refuses this order of roles.
        """
        if not self._inner.chat_template:
            start = [i for i in self._inner.encode("") if i == self._inner.bos_token_id]
            return start + self.encode("\n\n".join(m.content for m in messages) + "\n\n")
        return self._render([{"role": m.role, "content": m.content} for m in messages])

    @property
    def template(self) -> str:
        """The chat template, Jinja; empty where the model has none."""
        return str(self._inner.chat_template or "")

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """As `prompt`, for a template that understands more than roles and texts: tools, calls and their results.

        Raises:
            ModelError: the model has no chat template, or its template refuses this conversation.
        """
        return self._templated([dict(message) for message in messages], tools=[dict(tool) for tool in tools])

    def continuation(self, previous_ids: Sequence[int], observation: str) -> list[int]:
        """Token ids between an act and the next one.

        Args:
            previous_ids: the tokens the assistant drew; if the last one is its end token, it isn't repeated.
            observation: what the environment answers, as a user message.
        """
        if not self._inner.chat_template:
            return self.encode(f"\n\n{observation}\n\n")
        return self.following(previous_ids, [{"role": "user", "content": observation}])

    def following(
        self,
        previous_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """As `continuation`, where what follows the act are messages such as `conversation` takes.

        Raises:
            ModelError: the model has no chat template, or its template refuses these messages after an act.
        """
        act = [{"role": "user", "content": "."}, {"role": "assistant", "content": _ACT}]
        ids = self._templated([*act, *map(dict, messages)], after=_ACT, tools=[dict(tool) for tool in tools])
        if previous_ids and ids and previous_ids[-1] in self.end_ids and ids[0] in self.end_ids:
            ids = ids[1:]
        return ids

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends what the assistant says.

        Raises:
            ModelError: the tokenizer names none.
        """
        ids = self.continuation((), ".") if self._inner.chat_template else []
        if ids and ids[0] in self.end_ids:
            return ids[0]
        if not self.end_ids:
            raise ModelError("the model's tokenizer has no token that ends a turn.", "Use an instruction-tuned model.")
        return int(min(self.end_ids) if self._inner.eos_token_id is None else self._inner.eos_token_id)

    def ends_with_stop(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one of the stop strings is completed by the newest token."""
        if not stop:
            return False
        window = max(len(s.encode()) for s in stop) + 1
        return any(s in self.decode(ids[-window:]) for s in stop)

    def visible(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Text of a completion, cut before the first stop string."""
        text = self.decode(ids)
        cut = min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))
        return text[:cut]

    def _templated(
        self, conversation: list[dict[str, Any]], after: str = "", tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """As `_render`, of a model that has a template."""
        if not self._inner.chat_template:
            raise ModelError("the model has no chat template.", "Use /v1/completions, or an instruction-tuned model.")
        return self._render(conversation, after, tools)

    def _render(
        self, conversation: list[dict[str, Any]], after: str = "", tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of what the chat template makes of a conversation, from behind the text `after` on."""
        from jinja2 import TemplateError

        contents = "".join(_texts([conversation, tools or []]))
        written = {name for name in self._control if name in contents}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in contents)
        stand_in = dict(zip(sorted(written), free, strict=False))

        def safe(text: str) -> str:
            return self._control_pattern.sub(lambda f: stand_in[f[0]], text)

        given: dict[str, Any] = {"tools": _map_texts(tools, safe)} if tools else {}
        try:
            text = str(
                self._inner.apply_chat_template(
                    _map_texts(conversation, safe), tokenize=False, add_generation_prompt=True, **given
                )
            )
        except (TemplateError, TypeError) as error:
            raise ModelError(f"the model's chat template refuses this conversation: {error}.") from None
        if after not in text:
            raise ModelError("the model's chat template leaves out what the assistant said.")
        text = text.split(after, 1)[1] if after else text
        if not written:
            return list(self._inner.encode(text, add_special_tokens=False))
        # Whatever control token is in the text now is the template's own; between them there is nothing but text.
        ids: list[int] = []
        at = 0
        for found in [*self._control_pattern.finditer(text), None]:
            plain = text[at : found.start() if found else len(text)]
            for name, mark in stand_in.items():
                plain = plain.replace(mark, name)
            ids += self.encode(plain) if plain else []
            if found:
                ids.append(self._control[found[0]])
                at = found.end()
        return ids


def _texts(value: Any) -> Iterator[str]:
    """Every text in a nested value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested value with each text in it changed; keys of mappings are texts too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _as_set(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
