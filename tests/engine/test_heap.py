"""Large buffers stay out of the heap, also after larger ones were freed."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from shoal.engine.heap import keep_large_apart

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

found = ctypes.CDLL(None).mallinfo2
found.restype = Info
if sys.argv[1] == "apart":
    assert keep_large_apart()
torch.empty(24 << 20, dtype=torch.uint8)  # freed at once
before = found().hblkhd
kept = torch.empty(8 << 20, dtype=torch.uint8)
print(found().hblkhd - before)
"""


def _is_glibc() -> bool:
    """Whether the heap is glibc's, and says what it has mapped (2.33)."""
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not _is_glibc(), reason="needs glibc 2.33")
@pytest.mark.parametrize(("how", "mapped"), [("apart", 8 << 20), ("as it is", 0)])
def test_large_buffers_come_from_the_system(how: str, mapped: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) >= mapped > 0) or (mapped == int(done.stdout) == 0)
