"""Whole runs for the tests in a browser; see `runs`."""

from runs import runs, tiny_model

__all__ = ["runs", "tiny_model"]
