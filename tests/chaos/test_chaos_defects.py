"""What chaos found once, each made small."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.coordinator.journal import JOURNAL, Entry
from shoal.coordinator.rundir import RunDir
from shoal.errors import StorageError
from shoal.protocol.codec import read_jsonl, to_json


@contextmanager
def disk_that_ends_after(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond it: a write takes what fits, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_journal_that_met_a_full_disk_is_not_written_on_when_there_is_room_again(tmp_path: Path) -> None:
    """A coordinator that had failed went on for a moment: its next line followed half a line, or told of a group
    whose beginning was not written, and the run could not be resumed."""
    run = RunDir.create(tmp_path / "a run")
    start, lost = (Entry(what=what, numbers=(1,)) for what in ("start", "lost"))
    run.append_record(JOURNAL, Entry(what="start", numbers=(0,)))
    size = (run.path / JOURNAL).stat().st_size
    with disk_that_ends_after(size + len(to_json(start)) // 2), pytest.raises(StorageError, match="cannot be written"):
        run.append_record(JOURNAL, start)
    with pytest.raises(StorageError, match="cannot be written"):
        run.append_record(JOURNAL, lost)
    with pytest.raises(StorageError):
        run.event("run.ended")
    run.close()
    again = RunDir(run.path)
    again.append_record(JOURNAL, Entry(what="lost", numbers=(0,)))
    again.close()
    assert [(e.what, e.numbers) for e in read_jsonl(run.path / JOURNAL, Entry)] == [("start", (0,)), ("lost", (0,))]


READ_ONLY = """
import asyncio, sys
from pathlib import Path
from _chaos_disk import Disk, own_mounts
from shoal.coordinator.rundir import RunDir
from shoal.errors import StorageError

async def main(folder):
    own_mounts()
    disk = Disk(folder / "disk")
    await disk.open()
    try:
        run = RunDir.create(disk.path / "run")
        await disk.cover()
        for act in (lambda: run.write_atomic("buffer/0", b"x"), run.lock, lambda: run.append("journal.jsonl", b"{}")):
            try:
                act()
            except StorageError as error:
                print(error.problem)
        run.close()
    finally:
        await disk.close()

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.netns
def test_a_read_only_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    """Seed 5: what cleaned up after a file that could not be written failed in its turn, with a traceback."""
    path = os.pathsep.join([str(Path(__file__).parents[2] / "benchmarks"), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", READ_ONLY, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written: Read-only file system") == 3
