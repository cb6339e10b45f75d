"""What a model may write as its decision, as a JSON schema for constrained decoding, and how that becomes calls.

    {"thought": "…", "calls": [{"id": "a", "tool": "add", "arguments": {"x": 1, "y": 2}, "after": ["b"]}]}
    {"thought": "…", "answer": "…"}

The brief form, for small models, has neither thoughts nor ids nor dependencies. An argument may be the value of an
earlier result, `{"$result": "a"}`, which is a dependency as well.

Invariants: `parse` gives a decision or one line that says what is wrong, whatever the text; after `bind` every id is
new and every call's dependencies exist and form no cycle, or the call is refused; neither reads anything but the
decision, the cards and the ids given, so a tool's words cannot change what is permitted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Literal

import msgspec

from shoal.agents.scheduler.records import MAX_ID_CHARS, Call, Decision
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.outcome import Failure, Outcome, Success, failure

Form = Literal["full", "brief"]

MAX_DECISION_CHARS = 1 << 20
MAX_CALLS = 1000
"""Of one decision."""

BRIEF_CALLS = 8
"""Of one decision in the brief form: small models that have begun to repeat themselves don't end a list."""

MAX_SCHEMA_BYTES = 48 * 1024
"""A larger schema leaves the arguments open; they are checked against the card all the same."""

RESULT = "$result"

ANY_TEXT: Mapping[str, Any] = {"type": "string"}

_ID = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_ID_CHARS}}}")
_OPEN: dict[str, Any] = {"type": "object"}


class _WrittenCall(msgspec.Struct):
    tool: str
    arguments: dict[str, Any] = {}
    id: str = ""
    after: list[str] = []


class _Written(msgspec.Struct):
    thought: str = ""
    calls: list[_WrittenCall] = []
    answer: str | None = None


def decision_schema(
    cards: Mapping[str, ToolCard], form: Form, *, must_answer: bool = False, answer: Mapping[str, Any] = ANY_TEXT
) -> dict[str, Any]:
    """What the next decision must match; arguments are typed by the cards as far as `MAX_SCHEMA_BYTES` allows.

    Args:
        answer: the schema of an answer's text.
    """
    end = _object({**_thought(form), "answer": dict(answer)})
    if must_answer or not cards:
        return end
    made = {"anyOf": [_acts(cards, form, typed=True), end]}
    if len(msgspec.json.encode(made)) > MAX_SCHEMA_BYTES:
        made = {"anyOf": [_acts(cards, form, typed=False), end]}
    return made


def _thought(form: Form) -> dict[str, Any]:
    return {"thought": {"type": "string", "maxLength": 600}} if form == "full" else {}


def _acts(cards: Mapping[str, ToolCard], form: Form, *, typed: bool) -> dict[str, Any]:
    calls = []
    for card in cards.values():
        arguments = card.parameters if typed and "$defs" not in card.parameters else _OPEN
        if form == "full" and arguments is not _OPEN:
            arguments = {**arguments, "properties": _or_results(arguments.get("properties", {}))}
        fields: dict[str, Any] = {"tool": {"const": card.name}, "arguments": arguments}
        if form == "full":
            name = {"type": "string", "pattern": "^[a-z][a-z0-9_]{0,15}$"}
            fields = {"id": name, **fields, "after": {"type": "array", "items": name, "maxItems": 16}}
        calls.append(_object(fields, optional=("after",)))
    most = MAX_CALLS if form == "full" else BRIEF_CALLS
    list_of_calls = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}
    return _object({**_thought(form), "calls": list_of_calls})


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _or_results(properties: Mapping[str, Any]) -> dict[str, Any]:
    reference = _object({RESULT: {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}})
    return {name: {"anyOf": [schema, reference]} for name, schema in properties.items()}


def parse(text: str) -> tuple[Decision | None, str]:
    """The decision in a model's text, or what is wrong with it."""
    if len(text) > MAX_DECISION_CHARS:
        return None, f"the decision has {len(text)} characters; {MAX_DECISION_CHARS} are allowed"
    # Models without constrained decoding like to fence their JSON, or to say something first.
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return None, "the decision is not a JSON object"
    try:
        written = msgspec.json.decode(text[start : end + 1].encode(), type=_Written)
    except (msgspec.DecodeError, RecursionError) as error:
        return None, f"the decision is not JSON of the form asked for: {error}"
    except UnicodeEncodeError:
        return None, "the decision has characters that are no text"
    calls = tuple(Call(id=c.id, tool=c.tool, arguments=c.arguments, after=tuple(c.after)) for c in written.calls)
    if calls and written.answer is not None:
        return None, "a decision has calls or an answer, not both"
    if len(calls) > MAX_CALLS:
        return None, f"a decision has {len(calls)} calls; {MAX_CALLS} are allowed"
    return Decision(thought=written.thought, calls=calls, answer=written.answer), ""


def bind(calls: tuple[Call, ...], known: Container[str], first_number: int) -> tuple[list[Call], dict[str, Failure]]:
    """Calls with ids that are new in the run and dependencies that mean them; and why some are refused.

    Args:
        known: the ids that are taken.
        first_number: from here on, `c1`, `c2`, … are given to calls without an id of their own.
    """
    names: dict[str, str] = {}
    ids: list[str] = []
    number = first_number
    for call in calls:
        made = call.id
        if not _ID.fullmatch(made) or made in known or made in names.values():
            while (made := f"c{number}") in known or made in names.values():
                number += 1
        ids.append(made)
        if call.id not in names:
            names[call.id] = made
        names.setdefault(made, made)
    own = set(ids)
    bound: list[Call] = []
    refused: dict[str, Failure] = {}
    for call, made in zip(calls, ids, strict=True):
        arguments = _renamed(call.arguments, names)
        needed = dict.fromkeys([*(names.get(one, one) for one in call.after), *references(arguments)])
        for one in needed:
            if one not in own and one not in known:
                refused[made] = failure("arguments", f"it depends on {one[:MAX_ID_CHARS]!r}, and there is no such call")
        bound.append(Call(id=made, tool=call.tool, arguments=arguments, after=tuple(needed)))
    for one in _cyclic(bound):
        refused[one] = failure("arguments", "it depends on itself")
    return bound, refused


def references(value: Any) -> Iterator[str]:
    """The ids that arguments refer to."""
    if isinstance(value, dict):
        if set(value) == {RESULT} and isinstance(value[RESULT], str):
            yield value[RESULT]
            return
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def filled(value: Any, outcome_of: Callable[[str], Outcome | None]) -> Any:
    """Arguments with results in the place of references to them; all of them have succeeded."""
    if isinstance(value, dict):
        if set(value) == {RESULT} and isinstance(value[RESULT], str):
            outcome = outcome_of(value[RESULT])
            assert isinstance(outcome, Success), "a call is ready only when what it needs has succeeded"
            return outcome.value
        return {key: filled(item, outcome_of) for key, item in value.items()}
    return [filled(item, outcome_of) for item in value] if isinstance(value, list) else value


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        if set(value) == {RESULT} and isinstance(value[RESULT], str):
            return {RESULT: names.get(value[RESULT], value[RESULT])}
        return {key: _renamed(item, names) for key, item in value.items()}
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value


def _cyclic(calls: list[Call]) -> list[str]:
    """Calls that wait for themselves, directly or through others, found by taking away all that can run."""
    left = {call.id: set(call.after) for call in calls}
    dependents: dict[str, list[str]] = {}
    for call in calls:
        left[call.id] &= left.keys()
        for one in left[call.id]:
            dependents.setdefault(one, []).append(call.id)
    free = [one for one, needed in left.items() if not needed]
    while free:
        gone = free.pop()
        for other in dependents.get(gone, ()):
            left[other].discard(gone)
            if not left[other]:
                free.append(other)
        del left[gone]
    return list(left)
