"""Python functions as tools: types become schemas, the docstring becomes the description.

    async def weather(city: Annotated[str, Field(description="a town")]) -> str:
        \"\"\"Today's weather.\"\"\"

A function that waits is `async`. A plain function is called on the event loop, so it must return at once; what computes
for long belongs in a process of its own (an MCP server), because only a process can be stopped.

Invariant: a function is called with values that its own annotations accept, and what it returns is turned into JSON by
its return annotation.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from shoal.agents.tools.card import MAX_DESCRIPTION_CHARS, ToolCard, Use
from shoal.agents.tools.outcome import Outcome, failure, success
from shoal.errors import ConfigError

Progress = Callable[[str], None]
"""Called by a tool with a few words: it is still at work, which moves its deadline."""


class ToolError(Exception):
    """What a tool's function raises to say in its own words what went wrong.

    Args:
        message: for the model.
        retryable: whether the same call may succeed if it is made again.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable


class FunctionTool:
    """A function and its card.

    Args:
        function: every parameter annotated; one called `progress` and annotated `Progress` is filled in by us.
        use: how it may be used.
        name: by default the function's own.

    Raises:
        ConfigError: its annotations say too little, or no schema can be made of them.
    """

    def __init__(self, function: Callable[..., Any], use: Use | None = None, *, name: str = "") -> None:
        self._function = function
        called = name or function.__name__
        hints = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        self._wants_progress = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == "progress":
                self._wants_progress = True
                continue
            if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ConfigError(f"the tool {called} has no type for {parameter.name}.", "Annotate every parameter.")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints[parameter.name], default)
        if "return" not in hints:
            raise ConfigError(f"the tool {called} has no return type.", "Annotate what it returns.")
        try:
            self._arguments = create_model(called, __config__=ConfigDict(extra="forbid"), **fields)
            self._result: TypeAdapter[Any] = TypeAdapter(hints["return"])
            parameters = self._arguments.model_json_schema()
            output = self._result.json_schema(mode="serialization")
        except (PydanticUserError, PydanticSchemaGenerationError) as error:
            raise ConfigError(f"the types of the tool {called} cannot be described: {error.message}.") from None
        self.card = ToolCard(
            name=called,
            description=inspect.cleandoc(function.__doc__ or "")[:MAX_DESCRIPTION_CHARS],
            parameters=without_titles(parameters),
            output=without_titles(output),
            use=use or Use(),
        )
        self.card.check()

    async def call(self, arguments: dict[str, Any], progress: Progress) -> Outcome:
        """One call. Exceptions other than `ToolError` are the tool's defects, and the caller's to survive."""
        try:
            made = self._arguments.model_validate(arguments)
        except ValidationError as error:
            first = error.errors()[0]
            place = "/".join(str(part) for part in first["loc"])
            return failure("arguments", f"{place}: {first['msg']}")
        given = {name: getattr(made, name) for name in type(made).model_fields}
        if self._wants_progress:
            given["progress"] = progress
        try:
            value = self._function(**given)
            if inspect.isawaitable(value):
                value = await value
        except ToolError as error:
            return failure("error", error.message, retryable=error.retryable)
        return success(self._result.dump_python(value, mode="json"))


def without_titles(schema: Any) -> Any:
    """The same schema without pydantic's titles, which repeat names and cost a model tokens."""
    if isinstance(schema, dict):
        kept = {"default", "const", "enum", "examples"}
        return {
            key: value if key in kept else without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [without_titles(item) for item in schema] if isinstance(schema, list) else schema
