"""Shoal from Python, for notebooks and scripts: `Run`, `Swarm`, `Engine`, `Agent`, `Memory`, `evaluate`.

Everything here is plain calls, inside a running event loop (a notebook's) as outside of one: what waits, waits on a
loop in a thread of its own. `import shoal` gives the same names and loads each only when it is used. This room is
thin: it wires the rooms together as the commands do and adds nothing to what they can do.
"""

from __future__ import annotations

from shoal.api.agent import Agent, Done
from shoal.api.engine import Engine
from shoal.api.evaluation import Evaluation, evaluate
from shoal.api.memory import Memory
from shoal.api.run import Run
from shoal.api.swarm import Swarm

__all__ = ["Agent", "Done", "Engine", "Evaluation", "Memory", "Run", "Swarm", "evaluate"]
