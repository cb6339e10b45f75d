"""The fixtures of whole runs; see `runs`."""

from runs import runs, tiny_model

__all__ = ["runs", "tiny_model"]
