"""Replies as actions, and observations as text: OpenEnv's are JSON objects, an agent reads and writes words.

    text    the whole reply is one field of the action                      {"message": "the reply"}
    json    the reply is the action, a JSON object of the server's schema   {"row": 1, "column": 2}
    tool    the reply is a call of one of the environment's tools           {"tool": "move", "arguments": {"x": 1}}

Invariants: `read` gives one JSON object or raises `ActionError`; whatever a grammar lets through is read, but for
numbers that no float holds; the same observation gives the same text everywhere, at most so long, and without
`metadata` unless that is asked for (servers keep times and ids there).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.envs.openenv.session import Tool
from shoal.errors import ShoalError
from shoal.protocol.sampling import MAX_GRAMMAR_BYTES, Grammar

Form = Literal["text", "json", "tool"]

METADATA = "metadata"
MAX_DESCRIPTION_CHARS = 400


class ActionError(ShoalError):
    """A reply that is no action; its text is the agent's next observation."""


@dataclass(frozen=True)
class Acting:
    """How an agent acts in one environment.

    Args:
        form: what a reply is.
        key: for `text`: the action's field.
        schema: for `json`: the JSON schema of actions.
        tools: for `tool`: what may be called.
    """

    form: Form
    key: str = ""
    schema: Mapping[str, Any] | None = None
    tools: Sequence[Tool] = ()

    @property
    def told(self) -> str:
        """What an agent is told about replies."""
        if self.form == "json":
            return f"Answer with one JSON object that fits this schema:\n{_dumped(_stripped(self.schema or {}))}"
        if self.form == "tool":
            cards = [f"- {tool.name}: {_words(tool)} Arguments: {_dumped(tool.inputSchema)}" for tool in self.tools]
            return "\n".join(['Answer with one call of a tool: {"tool": "…", "arguments": {…}}. The tools:', *cards])
        return ""

    @property
    def grammar(self) -> Grammar | None:
        """What a reply must match; None where any text will do, or the schema is too large for a grammar."""
        if self.form == "text":
            return None
        text = _dumped(_stripped(self.schema or {}) if self.form == "json" else _calls(self.tools))
        return Grammar("json_schema", text) if len(text.encode()) <= MAX_GRAMMAR_BYTES else None

    def read(self, reply: str) -> str:
        """The action that a reply is, as the JSON that the server takes.

        Raises:
            ActionError: it is none.
        """
        if self.form == "text":
            return json.dumps({self.key: reply})
        found = _object(reply)
        if self.form == "json":
            return _action(found)
        name, arguments = found.get("tool"), found.get("arguments", {})
        names = [tool.name for tool in self.tools]
        if name not in names or not isinstance(arguments, dict):
            raise ActionError(f'A call is {{"tool": …, "arguments": {{…}}}}; the tools are {", ".join(names)}.')
        return _action({"type": "call_tool", "tool_name": name, "arguments": arguments})

    def shown(self, observation: Mapping[str, Any], keys: Sequence[str], most_chars: int) -> str:
        """An observation as text.

        Args:
            keys: the fields that are shown, one of them as it is; none: all.
        """
        said = _answer(observation) if self.form == "tool" else None
        if said is None:
            wanted = keys or [key for key in observation if key != METADATA]
            fields = {key: observation[key] for key in wanted if key in observation}
            said = _text(fields.get(keys[0], "") if len(keys) == 1 else fields or "")
        return said if len(said) <= most_chars else f"{said[: most_chars - 1]}…"


def _words(tool: Tool) -> str:
    return " ".join((tool.description or "").split())[:MAX_DESCRIPTION_CHARS]


def _answer(observation: Mapping[str, Any]) -> str | None:
    """What a tool answered; None where the observation is no tool's answer."""
    if "tool_name" not in observation:
        return None
    result, error = observation.get("result"), observation.get("error")
    if isinstance(error, Mapping):
        return f"error: {error.get('message', '')}"
    if isinstance(result, Mapping) and isinstance(content := result.get("content"), list):
        texts = [str(part["text"]) for part in content if isinstance(part, Mapping) and "text" in part]
        return "\n".join(["error:", *texts] if result.get("is_error") else texts)
    return _text(result)


def _calls(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of `tools`."""
    options = []
    for tool in tools:
        # A schema's references are to its own root, which would be another one here.
        arguments = {"type": "object"} if "$defs" in tool.inputSchema else dict(tool.inputSchema)
        options.append(
            {
                "type": "object",
                "properties": {"tool": {"const": tool.name}, "arguments": arguments},
                "required": ["tool", "arguments"],
                "additionalProperties": False,
            }
        )
    return options[0] if len(options) == 1 else {"anyOf": options}


def _stripped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without what every action has and no agent needs."""
    fields = schema.get("properties")
    if not isinstance(fields, Mapping):
        return dict(schema)
    return {**schema, "properties": {key: value for key, value in fields.items() if key != METADATA}}


def _object(reply: str) -> dict[str, Any]:
    """The first JSON object in a reply, whatever stands around it."""
    start = reply.find("{")
    if start < 0:
        raise ActionError("That is no JSON object.")
    try:
        found, _ = json.JSONDecoder().raw_decode(reply, start)
    except (ValueError, RecursionError) as error:
        raise ActionError(f"That is no JSON object: {str(error)[:100]}.") from None
    assert isinstance(found, dict)
    return found


def _action(found: Mapping[str, Any]) -> str:
    try:
        return json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ActionError(f"That is no JSON object: {str(error)[:100]}.") from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _dumped(value)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
