"""All entrances that are fuzzed."""

from __future__ import annotations

import fuzz_files
import fuzz_texts
import fuzz_wire
from fuzz_registry import TARGETS

__all__ = ["TARGETS", "fuzz_files", "fuzz_texts", "fuzz_wire"]
