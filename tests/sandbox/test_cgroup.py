"""Where a control group is made and what is written into it; on a real hierarchy only where one is delegated."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.sandbox import Job, Limits, Program, Sandbox, cgroup


def _hierarchy(root: Path, offers: dict[str, str]) -> tuple[str, str]:
    """Folders with their `cgroup.subtree_control`; returns stand-ins for /proc/self/mounts and /proc/self/cgroup."""
    for name, controllers in offers.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.subtree_control").write_text(controllers)
        (folder / "cgroup.procs").write_text("")
    (root / "mounts").write_text(f"proc /proc proc rw 0 0\ncgroup2 {root} cgroup2 rw 0 0\n")
    (root / "membership").write_text("9:name=systemd:/\n0::/session/scope\n")
    return str(root / "mounts"), str(root / "membership")


def test_the_nearest_group_that_controls_memory_and_processes(tmp_path: Path) -> None:
    places = _hierarchy(tmp_path, {"": "cpu memory pids", "session": "memory pids", "session/scope": ""})
    assert cgroup.parent_group(*places) == tmp_path / "session"
    places = _hierarchy(tmp_path, {"": "cpu memory pids", "session": "pids"})
    assert cgroup.parent_group(*places) == tmp_path
    places = _hierarchy(tmp_path, {"": "hugetlb", "session": ""})
    assert cgroup.parent_group(*places) is None
    (tmp_path / "mounts").write_text("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    assert cgroup.parent_group(*places) is None


def test_the_limits_are_written(tmp_path: Path) -> None:
    limits = Limits(memory_bytes=100 << 20, scratch_bytes=10 << 20, processes=7)
    group = cgroup.create(tmp_path, limits)
    assert group is not None
    written = {path.name: path.read_text() for path in group.folder.iterdir()}
    assert int(written["memory.max"]) == (110 << 20) + cgroup.OVERHEAD_BYTES
    assert written["memory.oom.group"] == "1" and written["memory.swap.max"] == "0" and int(written["pids.max"]) > 7
    assert not group.ran_out_of_memory()
    (group.folder / "memory.events").write_text("max 12\noom 1\noom_kill 1\n")
    assert group.ran_out_of_memory()
    assert cgroup.create(tmp_path / "missing", limits) is None


@pytest.mark.skipif(cgroup.parent_group() is None, reason="needs a cgroup v2 hierarchy with delegated memory and pids")
async def test_a_sandbox_in_a_group_of_its_own(sandbox: Sandbox) -> None:
    parent = cgroup.parent_group()
    assert parent is not None
    result = await sandbox.run(Program(Job(source="print(open('/proc/self/cgroup').read())")), Limits(wall_s=30))
    assert result.stdout.strip() == b"0::/", result
    assert not list(parent.glob("shoal-sandbox-*"))
