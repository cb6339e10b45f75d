"""The base of every section and the helper for sections that come in kinds.

Invariants: a section is frozen; unknown keys, nan and infinity are refused; a value is never converted from another
type (the text "40" is not the number 40, true is not 1). Only lists become tuples, so that sections stay hashable
in their parts and nobody edits a loaded configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints


class Section(BaseModel):
    """One TOML table. Each field's docstring is its documentation, in `--dry-run` and in error messages alike."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
"""`auto` takes a GPU where there is one."""

Strings = Annotated[tuple[str, ...], Field(strict=False)]
"""A TOML list of strings."""


def default_kind(key: str, kind: str) -> Callable[[Any], Any]:
    """A before-validator: a table that does not say its kind under `key` is of `kind`."""

    def fill(table: Any) -> Any:
        return {key: kind, **table} if isinstance(table, dict) and key not in table else table

    return fill
