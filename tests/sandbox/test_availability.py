"""What a user is told where sandboxes cannot be had, tried where that can be arranged."""

# Programs inside texts keep their long lines.

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.sandbox import Program, Sandbox, SandboxError, SandboxUnavailable, Setup, toolchain
from shoal.sandbox.availability import INSTALL_BWRAP, INSTALL_DENO, explain_failure
from shoal.sandbox.job import DenoRuntime, Job

ASK = """
import asyncio
from shoal.sandbox import Sandbox
found = asyncio.run(Sandbox.available())
print(found.python, found.deno)
for lack in found.missing: print(lack.what, '|', lack.remedy)
"""


async def test_missing_programs_are_named_with_their_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    found = await Sandbox.available()
    assert not found.python and not found.deno
    assert [lack.remedy for lack in found.missing] == [INSTALL_BWRAP, INSTALL_DENO]
    with pytest.raises(SandboxUnavailable, match="bwrap.*not installed.*apt-get install bubblewrap"):
        await Sandbox().run(Program(Job(source="")))
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    old.chmod(0o755)
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap 0\.4\.1 .* is older than 0\.7"):
        await Sandbox().run(Program(Job(source="")))
    toolchain.program_version.cache_clear()
    old.write_text("#!/bin/sh\necho bubblewrap 0.9.0\n")
    with pytest.raises(SandboxUnavailable, match="pip install deno"):
        await Sandbox().run(Program(Job(source=""), Setup(DenoRuntime())))
    toolchain.program_version.cache_clear()


@pytest.mark.parametrize(
    ("words", "kind", "telling"),
    [
        (
            "bwrap: Creating new namespace failed: Operation not permitted",
            SandboxUnavailable,
            "forbids user namespaces",
        ),
        ("bwrap: setting up uid map: Permission denied", SandboxUnavailable, "forbids user namespaces"),
        ("bwrap: No permissions to create new namespace", SandboxUnavailable, "forbids user namespaces"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", SandboxUnavailable, "systempaths"),
        ("bwrap: Can't find source path /root/x: Permission denied", SandboxError, "readable by every user"),
        ("launcher: [Errno 13] Permission denied", SandboxError, "readable by every user"),
        ("", SandboxUnavailable, "said|nothing"),
    ],
)
def test_what_bubblewrap_says_is_explained(words: str, kind: type[Exception], telling: str) -> None:
    error = explain_failure(words)
    assert type(error) is kind
    assert any(part in str(error) for part in telling.split("|")) and error.remedy


def _as_ordinary_user(repository: Path, command: list[str], code: str) -> str:
    """What `code` prints, run by a user without rights: an interpreter and sources that it can reach are needed."""
    python = sys.executable
    if os.geteuid() == 0:
        python = "/usr/bin/python3"
        if f"{sys.version_info.major}.{sys.version_info.minor}" not in os.path.realpath(python):
            pytest.skip("needs an interpreter of this version that every user can reach at /usr/bin/python3")
    path = os.pathsep.join([str(repository / "src"), str(Path(pytest.__file__).parents[1])])
    become = {"user": 23456, "group": 23456, "extra_groups": []} if os.geteuid() == 0 else {}
    answer = subprocess.run(
        [*command, python, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd="/",
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]}, **become,
    )  # type: ignore[call-overload]  # fmt: skip
    if any(words in answer.stderr for words in ("Permission denied", "No module named", "unshare", "cannot create")):
        pytest.skip(f"needs unshare(1), and sources and packages that every user can read: {answer.stderr.strip()}")
    assert answer.returncode == 0, answer
    return str(answer.stdout)


IN_NAMESPACE = ["unshare", "--user", "--map-root-user"]
FORBID = ["sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
RUN = "print(asyncio.run(Sandbox().run(Program(Job(source='import os; print(os.getuid())')))).stdout)"


def test_a_machine_that_forbids_user_namespaces(sandbox: Sandbox, repository: Path) -> None:
    """In a user namespace whose own limit is none."""
    answer = _as_ordinary_user(repository, IN_NAMESPACE + FORBID, ASK)
    assert answer.startswith("False False\n"), answer
    assert "max_user_namespaces is 0" in answer and "sysctl -w user.max_user_namespaces" in answer


@pytest.mark.parametrize("command", [[], IN_NAMESPACE], ids=["plain", "root of a rootless container"])
def test_an_ordinary_user_can_run_sandboxes(sandbox: Sandbox, repository: Path, command: list[str]) -> None:
    answer = _as_ordinary_user(repository, command, f"{ASK}from shoal.sandbox import Job, Program\n{RUN}")
    assert answer.startswith("True") and answer.endswith("b'65534\\n'\n"), answer


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_that_cannot_become_another_user_is_refused() -> None:
    """It would own root's files inside, and the kernel would not limit its processes."""
    if not shutil.which("unshare") or not shutil.which("bwrap"):
        pytest.skip("needs unshare(1) and bubblewrap")
    answer = subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60, check=False
    )
    if "unshare" in answer.stderr:
        pytest.skip(f"needs unshare(1): {answer.stderr.strip()}")
    assert answer.stdout.startswith("False False\nThis process is root and cannot become another user"), answer
