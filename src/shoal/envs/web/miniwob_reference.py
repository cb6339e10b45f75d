"""Policies that solve tasks of MiniWoB++ from the instruction and the tree alone (`policy`), by task."""

from __future__ import annotations

from shoal.envs.web import miniwob_clicks, miniwob_forms, miniwob_policy, miniwob_searches

# Each of these modules enters its policies when it is imported.
MODULES = (miniwob_clicks, miniwob_forms, miniwob_searches)

SOLVERS = miniwob_policy.SOLVERS
