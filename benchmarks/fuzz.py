"""How every entrance stands hostile bytes: a million inputs in all, made by a fuzzer that follows coverage.

An entrance (`tests/fuzzing`) is a function that reads what another machine, a user's file, a model, a tool or a page
says. It may take an input, or refuse it with the error that it promises. Counted are `crashes` (any other error),
`hangs` (more than a second of processor time, or of libFuzzer's ten by the clock) and `outgrown` (memory beyond
`--memory-mib`). What breaks one is kept in `--found`; put it into tests/fuzzing/found/TARGET once it is mended.

    shoal bench fuzz --json                        # every entrance; some five minutes
    shoal bench fuzz -- --only change records --runs 1000000 --seed 7
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.errors import RunError

from _common import benchmark, emit

HERE = Path(__file__).resolve().parents[1] / "tests" / "fuzzing"
MAX_BYTES = 1 << 16
TARGET_TIMEOUT_S = 1200.0

OUTCOMES = {"TooSlow": "hangs", "ALARM: working on the last": "hangs", "out-of-memory": "outgrown"}
"""What stands in the fuzzer's output, and what it is counted as; anything else is a crash."""


def targets() -> list[str]:
    """Names of all entrances."""
    sys.path.insert(0, str(HERE))
    from fuzz_targets import TARGETS

    return sorted(TARGETS)


def fuzz(names: Sequence[str], given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The entrances one after another, all in forks of one process; a row of each as soon as it is done."""
    options = [f"-runs={given.runs}", f"-seed={given.seed}", f"-max_len={MAX_BYTES}", "-timeout=10"]
    options.append(f"-rss_limit_mb={given.memory_mib}")
    command = [sys.executable, str(HERE / "fuzz_run.py"), str(folder), *names, "--", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "all.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for name in names:
            started = time.monotonic()
            while not (folder / f"{name}.code").exists():
                if process.poll() is not None and not (folder / f"{name}.code").exists():
                    raise RunError("The fuzzer ended.", f"It said:\n{(folder / 'all.log').read_text()[-3000:]}")
                if time.monotonic() - started > TARGET_TIMEOUT_S:
                    raise RunError(f"{name} took longer than {TARGET_TIMEOUT_S:g} s.", "Give fewer --runs.")
                time.sleep(0.1)
            yield row(name, folder, time.monotonic() - started)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def row(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What came of one entrance."""
    output = (folder / f"{name}.log").read_text(errors="replace")
    done = max((int(number) for number in re.findall(r"^#(\d+)", output, flags=re.MULTILINE)), default=0)
    found: dict[str, Any] = {"target": name, "cases": done, "seconds": seconds}
    found |= {"crashes": 0, "hangs": 0, "outgrown": 0}
    if (folder / f"{name}.code").read_text() != "0":
        kind = next((counted for sign, counted in OUTCOMES.items() if sign in output), "crashes")
        found[kind] = 1
        found["said"] = output[-3000:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", metavar="TARGET")
    parser.add_argument("--runs", type=int, default=30_000, help="inputs for each entrance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory-mib", type=int, default=2048, help="torch and the project take 500 of them")
    parser.add_argument("--found", type=Path, default=Path("runs/fuzz"), help="where inputs that broke something go")
    given = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise RunError("the fuzzer is not installed.", "Install it with pip install atheris (Linux).") from None
    known = targets()
    for name in given.only or ():
        if name not in known:
            raise RunError(f"there is no entrance {name!r}.", f"There are {', '.join(known)}.")
    rows = []
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as name:
        folder = Path(name)
        for found in fuzz(given.only or known, given, folder):
            rows.append(found)
            bad = [key for key in ("crashes", "hangs", "outgrown") if found[key]]
            print(f"{found['target']}: {found['cases']} inputs {', '.join(bad)}", file=sys.stderr)
            for kept in folder.glob(f"{found['target']}-*"):
                given.found.mkdir(parents=True, exist_ok=True)
                shutil.copy(kept, given.found / kept.name)
    totals = {key: sum(row[key] for row in rows) for key in ("cases", "crashes", "hangs", "outgrown")}
    emit(rows, {"targets": len(rows), **totals})


if __name__ == "__main__":
    benchmark(main)
