"""Shoal: post-train one open model on many machines that do not share a datacentre, and serve it there.

The house, floor by floor, is drawn in README.md; each room's `__init__` says what the room is for.
Importing this package loads nothing heavy: torch is imported only inside `engine` and `learner`.
"""

__version__ = "0.1.0"

PROTOCOL_VERSION = 3
"""Rises by one whenever a message between nodes changes shape; nodes of different versions refuse each other."""
