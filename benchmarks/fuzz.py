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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shoal.errors import RunError

from _common import benchmark, emit

HERE = Path(__file__).resolve().parents[1] / "tests" / "fuzzing"
MAX_BYTES = 1 << 16
RUN_TIMEOUT_S = 1200.0

OUTCOMES = {"TooSlow": "hangs", "ALARM: working on the last": "hangs", "out-of-memory": "outgrown"}
"""What stands in the fuzzer's output, and what it is counted as; anything else is a crash."""


def targets() -> list[str]:
    """Names of all entrances."""
    sys.path.insert(0, str(HERE))
    from fuzz_targets import TARGETS

    return sorted(TARGETS)


def fuzz(name: str, given: argparse.Namespace, found: Path) -> dict[str, Any]:
    """One entrance, in a process of its own."""
    clock = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as corpus:
        options = (
            f"-runs={given.runs}",
            f"-seed={given.seed}",
            f"-max_len={MAX_BYTES}",
            f"-rss_limit_mb={given.memory_mib}",
            "-timeout=10",
            f"-artifact_prefix={found / name}-",
        )
        command = [sys.executable, str(HERE / "fuzz_run.py"), name, corpus, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": corpus}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            try:
                output = process.communicate(timeout=RUN_TIMEOUT_S)[0].decode(errors="replace")
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    seconds = time.monotonic() - clock
    done = max((int(number) for number in re.findall(r"^#(\d+)", output, flags=re.MULTILINE)), default=0)
    row: dict[str, Any] = {"target": name, "cases": done, "cases_per_s": done / seconds, "seconds": seconds}
    row |= {"crashes": 0, "hangs": 0, "outgrown": 0}
    if process.returncode != 0:
        kind = next((counted for sign, counted in OUTCOMES.items() if sign in output), "crashes")
        row[kind] = 1
        row["said"] = output[-3000:]
    return row


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
    given.found.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.only or known:
        rows.append(fuzz(name, given, given.found))
        bad = [key for key in ("crashes", "hangs", "outgrown") if rows[-1][key]]
        print(f"{name}: {rows[-1]['cases']} inputs {', '.join(bad)}", file=sys.stderr)
    totals = {key: sum(row[key] for row in rows) for key in ("cases", "crashes", "hangs", "outgrown")}
    emit(rows, {"targets": len(rows), **totals})


if __name__ == "__main__":
    benchmark(main)
