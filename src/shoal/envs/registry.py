"""Environments by short name or by import path, loaded only when asked for.

Invariant: importing this module imports no environment. An import path names code that is already installed on this
machine; nothing is ever fetched.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from shoal.envs.base import Environment, parse_settings
from shoal.errors import TaskError

ENVIRONMENTS: dict[str, str] = {
    "arithmetic": "shoal.envs.arithmetic:Arithmetic",
    "dataset": "shoal.envs.dataset:DatasetQuestions",
    "dream": "shoal.envs.dream.environment:DreamEnvironment",
    "evm": "shoal.envs.evm.environment:EvmQuests",
    "external": "shoal.envs.external:External",
    "judged": "shoal.envs.judged:Judged",
    "jsonl": "shoal.envs.jsonl:JsonLines",
    "openenv": "shoal.envs.openenv.environment:OpenEnv",
    "openenv_live": "shoal.envs.openenv.environment:LiveOpenEnv",
    "reasoning_gym": "shoal.envs.reasoning_gym:ReasoningGym",
    "sokoban": "shoal.envs.sokoban:Sokoban",
    "web": "shoal.envs.web.environment:Web",
    "web_hosted": "shoal.envs.web.hosted:HostedWeb",
}
"""Short name -> import path."""


def find(kind: str) -> type[Environment]:
    """The environment class with the short name or import path (`package.module:Class`) `kind`.

    Raises:
        TaskError: there is none; the message lists the names, or says what is wrong with the import path.
    """
    path = ENVIRONMENTS.get(kind, kind)
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name.isidentifier():
        near = difflib.get_close_matches(kind, ENVIRONMENTS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        names = ", ".join(sorted(ENVIRONMENTS))
        raise TaskError(
            f"there is no environment {kind!r}.",
            f"{hint}Choose one of {names}, or give an import path such as my_package.my_module:MyEnvironment.",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise TaskError(
            f"environment {kind!r} cannot be imported: {error}.",
            "Install the package that holds it on every machine of the run, or put its folder on PYTHONPATH.",
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise TaskError(
            f"environment {kind!r}: {module_name} has no environment class {class_name!r}.",
            "The class must derive from shoal.envs.base.Environment.",
        )
    return found


def make(kind: str, settings: Mapping[str, Any] | None = None, *, name: str = "") -> Environment:
    """An environment of type `kind` (as `find` takes it), its tasks labelled `name` (by default `kind`).

    Make one for each environment of a run; `fresh()` on it gives each episode its own.

    Raises:
        TaskError: the environment cannot be found.
        ConfigError: a setting is unknown or out of range.
    """
    found = find(kind)
    return found(parse_settings(found.Settings, settings or {}, name or kind), name=name or kind)
