"""Which parts of the loop run on this machine, and why others do not.

An environment runs where what it needs is installed: it is asked for, not guessed. Memory and collective run unless
they are left out or have nothing to work with. Nothing is started here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.config import Config, Environment
from shoal.errors import ConfigError, ShoalError, TaskError

Part = Literal["memory", "collective"]

WEB_CORES = 4
"""A browser's pages take a core of their own: with fewer, what trains would wait for them."""

NOT_WANTED = "left out by --without"


@dataclass(frozen=True)
class Parts:
    """What runs."""

    config: Config
    """With the environments that run here, and no others."""
    memory: bool
    collective: bool
    left_out: dict[str, str]
    """Part -> why it does not run."""

    @property
    def processes(self) -> list[str]:
        """Names of the processes while training goes on."""
        workers = [f"local-{number}" for number in range(self.config.workers.count)]
        more = [name for name, runs in (("agents", self.collective), ("memory", self.memory)) if runs]
        return ["coordinator", "learner", *workers, "server", *more]


def parts_of(config: Config, without: Sequence[Part] = ()) -> Parts:
    """What of a configuration's loop runs here.

    Raises:
        ConfigError: the mode has no versions to follow, or an environment's settings are wrong.
        TaskError: no environment runs here.
    """
    if config.learner.mode == "colocated":
        raise ConfigError(
            "in colocated mode one process samples and trains, and nobody follows it.", "Set learner.mode to async."
        )
    left_out = {name: reason for name, env in config.envs.items() if (reason := lacking(env))}
    envs = {name: env for name, env in config.envs.items() if name not in left_out}
    if not envs:
        raise TaskError(f"none of the environments runs here: {'; '.join(left_out.values())}")
    if "memory" in without:
        left_out["memory"] = NOT_WANTED
    elif not config.memory.recall:
        left_out["memory"] = "memory.recall is off"
    if "collective" in without:
        left_out["collective"] = NOT_WANTED
    elif not config.loop.experts:
        left_out["collective"] = "there are no experts: [loop.experts.NAME]"
    return Parts(
        config.model_copy(update={"envs": envs}), "memory" not in left_out, "collective" not in left_out, left_out
    )


def lacking(env: Environment) -> str:
    """What an environment needs and this machine lacks; empty where nothing."""
    from shoal.envs.registry import make

    try:
        if env.type == "web":
            from shoal.envs.web.browser import require_browser

            require_browser()
            if (cores := _cores()) < WEB_CORES:
                return f"pages take a core of their own: {cores} are here, {WEB_CORES} are needed"
        make(env.type, env.settings)
    except ConfigError:
        raise
    except ImportError as error:
        return f"{error.name} is not installed"
    except ShoalError as error:
        return error.problem
    return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
