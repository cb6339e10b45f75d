"""Takes a defence away before anything runs: `SHOAL_UNDEFENDED` names the threat (see `removal/sitecustomize`).

A function keeps its identity and loses its code, so that it is gone wherever it was imported to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

from threats import THREATS


def function_at(path: str) -> FunctionType:
    """The function or method `module:name` or `module:Class.name`."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    found = getattr(found, "__wrapped__", found)
    assert isinstance(found, FunctionType), path
    return found


def replace(path: str, without: Callable[..., Any]) -> None:
    """Let another function's code run in a function's place."""
    function = function_at(path)
    assert isinstance(without, FunctionType)
    assert not function.__code__.co_freevars, f"{path} is a closure"
    function.__code__ = without.__code__
    function.__defaults__, function.__kwdefaults__ = without.__defaults__, without.__kwdefaults__


def remove(threat: str) -> None:
    """Take away what stands against a threat."""
    for path, without in next(one for one in THREATS if one.name == threat).removed:
        replace(path, without)
