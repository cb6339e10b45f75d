"""How a model family writes tool calls and reasoning, and how they are read back.

    hermes    <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>      Qwen, SmolLM, Hermes; and whoever has none
    llama     {"name": …, "parameters": {…}}                                  Llama 3
    mistral   [{"name": …, "arguments": {…}}, …]                              Mistral (its control token is not text)

Reasoning stands between <think> and </think>. A template that knows tools gets them as its own; for any other they are
described in the system message, and calls and results are written as text.

Invariants: what is reported as a call has the name of a tool that was offered and arguments that are a JSON object;
everything else is content. With `tool_choice` required or named, and wherever an answer begins as a call does, the
grammar makes it a call that matches its tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.serving.schema import ChatMessage, Tool

Family = Literal["hermes", "llama", "mistral"]

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class Reply:
    """A completion's text, taken apart."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """One family's way to write.

    Args:
        family: how calls are written.
        native_tools: the chat template describes tools itself.
        thinks: the model reasons between tags.
    """

    family: Family = "hermes"
    native_tools: bool = False
    thinks: bool = False
    opening: str = field(init=False)
    """What a call begins with, so that nothing that may be one is shown as content."""
    argument_key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "opening", {"hermes": "<tool_call>", "llama": "{", "mistral": "["}[self.family])
        object.__setattr__(self, "argument_key", "parameters" if self.family == "llama" else "arguments")

    @staticmethod
    def of(template: str) -> Dialect:
        """The dialect that a chat template speaks."""
        family: Family = "hermes"
        if "[TOOL_CALLS]" in template:
            family = "mistral"
        elif "<tool_call>" not in template and ("python_tag" in template or "ipython" in template):
            family = "llama"
        return Dialect(family, native_tools=re.search(r"\btools\b", template) is not None, thinks=THOUGHT in template)

    def messages(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """The conversation as the template takes it."""
        rendered = [self._native(m) if self.native_tools else self._textual(m) for m in messages]
        if tools and not self.native_tools:
            described = self._described(tools)
            if rendered[0]["role"] == "system":
                rendered[0] = {"role": "system", "content": f"{rendered[0]['content']}\n\n{described}"}
            else:
                rendered.insert(0, {"role": "system", "content": described})
        return rendered

    def _native(self, message: ChatMessage) -> dict[str, Any]:
        found: dict[str, Any] = {"role": _role(message), "content": message.text}
        if message.tool_calls:
            found["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": _object(c)}}
                for c in message.tool_calls
            ]
        if message.tool_call_id:
            found["tool_call_id"] = message.tool_call_id
        if message.name:
            found["name"] = message.name
        return found

    def _textual(self, message: ChatMessage) -> dict[str, Any]:
        if message.role == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
        written = [self._written(c.function.name, _object(c)) for c in message.tool_calls or ()]
        return {"role": _role(message), "content": "\n".join(filter(None, [message.text, *written]))}

    def _written(self, name: str, arguments: Any) -> str:
        body = json.dumps({"name": name, self.argument_key: arguments}, ensure_ascii=False)
        return {"hermes": f"<tool_call>\n{body}\n</tool_call>", "llama": body, "mistral": f"[{body}]"}[self.family]

    def _described(self, tools: Sequence[Tool]) -> str:
        lines = "\n".join(tool.model_dump_json(exclude_none=True) for tool in tools)
        return (
            "You may call these functions:\n<tools>\n" + lines + "\n</tools>\n"
            "To call one, answer with nothing but\n" + self._written("NAME", {"PARAMETER": "VALUE"})
        )

    def grammar(self, tools: Iterable[Tool], *, must_call: bool, parallel: bool) -> str:
        """Calls of these tools, or, unless one must call, text that begins as no call does, thoughts before calls
        included; llguidance's Lark."""
        bodies = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    self.argument_key: {"type": "object", **(tool.function.parameters or {})},
                },
                "required": ["name", self.argument_key],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            }
            for tool in tools
        ]
        rules = [f"body{i}: %json {json.dumps(body)}" for i, body in enumerate(bodies)]
        rules.append("body: " + " | ".join(f"body{i}" for i in range(len(bodies))))
        one, between = {
            "hermes": (r'"<tool_call>\n" body "\n</tool_call>"', r'"\n"'),
            "llama": ("body", '"; "'),
            "mistral": ('"[" body "]"' if not parallel else "body", '", "'),
        }[self.family]
        several = f"call ({between} call)*" if parallel else "call"
        if self.family == "mistral" and parallel:
            several = f'"[" {several} "]"'
        first = re.escape(self.opening[0])
        start = "calls" if must_call else "calls | free"
        thought = r"<think>(.|\n)*|" if self.thinks and THINK.startswith(first) else ""
        free = rf"free: /({thought}[^{first}](.|\n)*)?/"
        return "\n".join([f"start: {start}", f"calls: {several}", f"call: {one}", free, *rules])

    def read(self, text: str, tools: Sequence[Tool]) -> Reply:
        """Take a completion apart. A thought that was cut off is reasoning to its end."""
        reasoning = ""
        if self.thinks and text.lstrip().startswith(THINK):
            thought, _, text = text.lstrip().removeprefix(THINK).partition(THOUGHT)
            reasoning, text = thought.strip(), text.lstrip("\n")
        if not tools:
            return Reply(text, reasoning)
        names = {tool.function.name for tool in tools}
        calls: list[Call] = []
        rest: list[str] = []
        for piece, may_be_call in self._pieces(text):
            found = self._calls_in(piece, names) if may_be_call else ()
            calls += found
            rest += [] if found else [piece]
        return Reply("".join(rest).strip() if calls else text, reasoning, tuple(calls))

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """The text in order, each piece with whether it may be a call."""
        if self.family != "hermes":
            return [(piece, True) for piece in (text.split("; ") if self.family == "llama" else [text])]
        parts = re.split(r"<tool_call>\s*(.*?)\s*</tool_call>", text, flags=re.DOTALL)
        return [(part, index % 2 == 1) for index, part in enumerate(parts)]

    def _calls_in(self, piece: str, names: set[str]) -> tuple[Call, ...]:
        try:
            found = _loaded(piece)
        except (ValueError, RecursionError):
            return ()
        calls: list[Call] = []
        for item in found if isinstance(found, list) else [found]:
            name = item.get("name") if isinstance(item, dict) else None
            arguments = item.get(self.argument_key) if isinstance(item, dict) else None
            if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
                return ()
            calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
        return tuple(calls)


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _object(call: Any) -> Any:
    """A call's arguments as an object; what is no JSON stays the text it is."""
    try:
        return _loaded(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments


def _loaded(text: str) -> Any:
    """What JSON says; raises `ValueError` also for what Python reads and nobody can write: NaN, half a character."""
    found = json.loads(text)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    return found
