"""Attacks use what the tests of the rooms under attack have made for themselves."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("agents", "coordinator", "engine", "swarm"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
