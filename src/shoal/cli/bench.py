"""`shoal bench`: runs one benchmark in a process of its own and prints its numbers with where they came from.

A benchmark is a file `benchmarks/NAME.py`; it says its result through `benchmarks/_common.py`, in a file whose name
it finds in `SHOAL_BENCH_RESULT`. Whatever it prints goes to standard error as it comes, so that standard output
carries the result alone: `{"name", "commit", "machine", "seconds", "rows": [...], "headline": {key: number}}`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import json as json_codec
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shoal
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import RunError

STOP_WAIT_S = 10.0
"""A benchmark that is told to stop has this long before it is killed."""


def run(
    name: str | None = None,
    /,
    *arguments: str,
    folder: Path | None = None,
    timeout_s: float = 5400.0,
    json: Json = False,
) -> None:
    """Run a benchmark and print its numbers; without a name, list the benchmarks.

    For example:

        shoal bench
        shoal bench startup --json
        SHOAL_DATA=~/data shoal bench engine

    Args:
        name: The benchmark, a file in the benchmarks folder without its ending.
        arguments: Handed to the benchmark; put -- before those that begin with a dash.
        folder: Folder of the benchmarks, where it is not the checkout's own.
        timeout_s: The benchmark is stopped after this long.
    """
    benchmarks = find_benchmarks(folder)
    if name is None:
        _list(benchmarks, json)
        return
    if name not in benchmarks:
        close = difflib.get_close_matches(name, benchmarks, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(benchmarks) or 'none'}."
        raise RunError(f"There is no benchmark {name}.", hint)
    started = time.monotonic()
    result = _execute(benchmarks[name], arguments, timeout_s)
    report = {
        "name": name,
        "commit": commit_of(benchmarks[name].parent),
        "machine": describe_machine(),
        "seconds": round(time.monotonic() - started, 3),
        "rows": result["rows"],
        "headline": result["headline"],
    }
    if json:
        print_json(report)
    else:
        _show(report)


def find_benchmarks(folder: Path | None = None) -> dict[str, Path]:
    """Name to file of every benchmark in `folder`, by default the checkout's `benchmarks`.

    Raises:
        RunError: there is no such folder.
    """
    where = folder or Path(__file__).parents[3] / "benchmarks"
    if not where.is_dir():
        raise RunError(f"There is no folder of benchmarks at {where}.", "Run from a checkout, or give --folder.")
    return {file.stem: file.resolve() for file in sorted(where.glob("*.py")) if not file.stem.startswith("_")}


def _execute(script: Path, arguments: tuple[str, ...], timeout_s: float) -> dict[str, Any]:
    """Run the script to its end and return the `rows` and `headline` that it emitted."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        result_file = Path(scratch) / "result.json"
        source = str(Path(shoal.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "SHOAL_BENCH_RESULT": str(result_file),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, str(script), *arguments]
        # The benchmark writes its progress straight to our standard error: nothing to pump, nothing to block on.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), env=environment
        ) as process:
            try:
                code = process.wait(timeout_s)
            except BaseException as interruption:
                _stop(process)
                if isinstance(interruption, subprocess.TimeoutExpired):
                    raise RunError(
                        f"The benchmark {script.stem} was not done after {timeout_s:g} s.",
                        "Give it more by --timeout-s.",
                    ) from None
                raise
        try:
            result: dict[str, Any] = json_codec.loads(result_file.read_bytes())
        except FileNotFoundError:
            reason = "emitted no result" if code == 0 else f"ended with exit code {code}"
            raise RunError(f"The benchmark {script.stem} {reason}.", "Its own output above says why.") from None
    if "error" in result:
        raise RunError(result["error"]["problem"], result["error"]["remedy"])
    if code != 0:
        raise RunError(f"The benchmark {script.stem} ended with exit code {code}.", "Its own output above says why.")
    return result


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def commit_of(folder: Path) -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; `None` outside a checkout or before one."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def describe_machine() -> str:
    """Processor, cores, memory, GPU, system, Python and torch, in one line."""
    parts = [_processor(), f"{len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()} cores"]
    if sys.platform == "linux":
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    parts += [_gpu() or "no GPU", f"{platform.system()} {platform.machine()}", f"Python {platform.python_version()}"]
    try:
        parts.append(f"torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no torch")
    return ", ".join(parts)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _gpu() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return ", ".join(answer.stdout.split("\n")).strip(", ") if answer.returncode == 0 else ""


def _list(benchmarks: dict[str, Path], json: bool) -> None:
    about = {name: _about(path) for name, path in benchmarks.items()}
    if json:
        print_json({"benchmarks": about})
        return
    for name, line in about.items():
        console().print(f"{name:20}{line}", markup=False, soft_wrap=True)
    note("Run one by: shoal bench NAME")


def _about(path: Path) -> str:
    """First line of the benchmark's docstring, read without running it."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    except SyntaxError:
        docstring = None
    return (docstring or "").partition("\n")[0]


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in report["rows"] for key in row))
    table = Table()
    for column in columns:
        table.add_column(Text(column))
    for row in report["rows"]:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    terminal = console()
    if columns:
        terminal.print(table)
    for key, number in report["headline"].items():
        terminal.print(Text.assemble((f"{key} ", "bold"), _cell(number)))
    footer = (
        f"{report['name']} at commit {report['commit'] or 'none'}, {report['seconds']:.1f} s, on {report['machine']}"
    )
    terminal.print(Text(footer, style="dim"))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
