"""JSON schemas of arguments and results, checked without trusting who wrote them.

Invariants: a schema never makes us fetch anything (`offline`), and its regular expressions run in linear time; what
does not match is told in one line that a model can act on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from shoal.errors import RecordError

MAX_PROBLEMS = 3
"""A model that reads more than this mends nothing."""

MAX_PROBLEM_CHARS = 300


class Schema:
    """One compiled schema.

    Raises:
        RecordError: it is no valid schema.
    """

    def __init__(self, schema: Mapping[str, Any], what: str) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(
                dict(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions()
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError, RecursionError) as error:
            raise RecordError(f"the schema of {what} cannot be used: {str(error)[:MAX_PROBLEM_CHARS]}.") from None

    def problem(self, value: Any) -> str:
        """What is wrong with a value; empty where it matches."""
        try:
            if self._validator.is_valid(value):
                return ""
            found: list[str] = []
            for error in self._validator.iter_errors(value):
                place = "/".join(str(part) for part in error.instance_path)
                found.append(f"{place}: {error.message}"[:MAX_PROBLEM_CHARS].removeprefix(": "))
                if len(found) == MAX_PROBLEMS:
                    break
        except (ValueError, TypeError, RecursionError) as error:
            return f"not JSON: {error}"
        return "; ".join(found) or "it does not match"
