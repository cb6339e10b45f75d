"""`shoal bench` with small benchmarks written by the tests, and what `benchmarks/_common.py` offers them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from shoal.cli.bench import commit_of, describe_machine, find_benchmarks
from shoal.errors import RunError, TaskError

GOOD = '''"""Counts to three.

And says so.
"""
import sys
from _common import benchmark, emit

def main() -> None:
    print("progress on stdout")
    print("progress on stderr", file=sys.stderr)
    rows = [{"who": "[red]us[/red]", "seconds": 1.25}, {"who": "them", "note": None}]
    emit(rows, {"speedup": 2.5, "arguments": len(sys.argv) - 1})

if __name__ == "__main__":
    benchmark(main)
'''


@pytest.fixture
def folder(tmp_path: Path, repository: Path) -> Path:
    shutil.copy(repository / "benchmarks" / "_common.py", tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    return tmp_path


@pytest.fixture
def common(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_common", repository / "benchmarks" / "_common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_one_json_object_and_progress_beside_it(folder: Path) -> None:
    done = bench("good", "--folder", str(folder), "--json", "--", "a", "--b")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == ["name", "commit", "machine", "seconds", "rows", "headline"]
    assert report["name"] == "good"
    assert report["rows"] == [{"who": "[red]us[/red]", "seconds": 1.25}, {"who": "them", "note": None}]
    assert report["headline"] == {"speedup": 2.5, "arguments": 2}
    assert 0 < report["seconds"] < 60
    assert "progress on stdout" in done.stderr
    assert "progress on stderr" in done.stderr


def test_a_table_for_people(folder: Path) -> None:
    done = bench("good", "--folder", str(folder))
    assert done.returncode == 0
    for word in ("who", "[red]us[/red]", "1.25", "speedup 2.5", describe_machine()[:12]):
        assert word in done.stdout


def test_the_list_reads_without_running(folder: Path) -> None:
    (folder / "broken.py").write_text("def (:")
    done = bench("--folder", str(folder), "--json")
    assert json.loads(done.stdout) == {"benchmarks": {"broken": "", "good": "Counts to three."}}
    assert "_common" not in find_benchmarks(folder)
    assert "good                Counts to three." in bench("--folder", str(folder)).stdout


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise SystemExit(3)", ["ended with exit code 3"]),
        ("pass", ["emitted no result"]),
        ("1 / 0", ["ended with exit code 1"]),
        ("emit([], {'x': float('nan')})", ["ended with exit code 1"]),
        ("emit([], {}); raise SystemExit(4)", ["ended with exit code 4"]),
        (
            "need_program('no-such-program', 'apt-get install -y no-such')",
            ["no-such-program", "apt-get install -y no-such"],
        ),
        ("need_data('questions.jsonl')", ["SHOAL_DATA", "questions.jsonl"]),
    ],
)
def test_what_goes_wrong_is_said(folder: Path, body: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    (folder / "bad.py").write_text(f"from _common import *\ndef main():\n    {body}\nbenchmark(main)\n")
    done = bench("bad", "--folder", str(folder), "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    for word in words:
        assert word in f"{error['problem']} {error['remedy']}"


def test_a_benchmark_that_takes_too_long_is_stopped(folder: Path) -> None:
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    done = bench("slow", "--folder", str(folder), "--timeout-s", "0.5", timeout=30)
    assert done.returncode == 2
    assert "not done after 0.5 s" in done.stderr


def test_a_benchmark_runs_alone_too(folder: Path) -> None:
    done = subprocess.run([sys.executable, str(folder / "good.py")], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1])["headline"] == {"speedup": 2.5, "arguments": 0}
    (folder / "lacks.py").write_text("from _common import *\nbenchmark(lambda: need_program('no-such-program', 'x'))\n")
    done = subprocess.run([sys.executable, str(folder / "lacks.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: This benchmark needs the program no-such-program")


def test_need_data(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    with pytest.raises(TaskError, match="there is no a.jsonl in it"):
        common.need_data("a.jsonl")
    (tmp_path / "a.jsonl").touch()
    assert common.need_data("a.jsonl") == tmp_path / "a.jsonl"
    assert common.need_program("git", "apt-get install -y git").name == "git"


def make_package(where: Path, name: str) -> Path:
    """A package that pip installs without a network or a build back end of its own."""
    where.mkdir(parents=True)
    wheel = where / f"{name}-1.0-py3-none-any.whl"
    import zipfile

    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "ANSWER = 42\n")
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        record = "".join(f"{entry},,\n" for entry in [*archive.namelist(), f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return wheel


def test_peer_env_is_built_once(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "cache"))
    wheels = [str(make_package(tmp_path / "wheels" / name, name)) for name in ("peerpkg", "troublemaker")]
    pythons: list[Path] = []

    def build() -> None:
        pythons.append(common.peer_env("peer", wheels, uninstall=["troublemaker"]))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(pythons) == 2
    assert len(set(pythons)) == 1
    assert len(list((tmp_path / "cache" / "peers").glob("peer-*/"))) == 1
    probe = (
        "import peerpkg, importlib.util as u; print(peerpkg.ANSWER, u.find_spec('troublemaker'), u.find_spec('torch'))"
    )
    said = subprocess.run([pythons[0], "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout == "42 None None\n"


@pytest.mark.slow
def test_peer_env_says_what_pip_said(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="pip could not build the environment of peer") as caught:
        common.peer_env("peer", [str(tmp_path / "missing-1.0-py3-none-any.whl")])
    assert "missing-1.0" in caught.value.problem
    assert "-m pip" in caught.value.remedy


def test_commit_and_machine(repository: Path, tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    commands = (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "--allow-empty", "-m", "x"],
    )
    for arguments in commands:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, timeout=60)
    (tmp_path / "file").write_text("a")
    commit = commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 12
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True, timeout=60)
    assert commit_of(tmp_path) == f"{commit}-dirty"
    assert "cores" in describe_machine()
    assert "Python 3." in describe_machine()
