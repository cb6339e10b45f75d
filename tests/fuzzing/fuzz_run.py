"""Fuzz targets under a fuzzer that follows coverage (atheris, libFuzzer underneath).

    python tests/fuzzing/fuzz_run.py FOLDER change records -- -runs=50000 -seed=1

Each target is fuzzed in a fork of this process, so that what they all need is imported once. Of each, FOLDER gets what
the fuzzer says (`TARGET.log`), how it ended (`TARGET.code`: 0 after that many runs) and what broke it (`TARGET-…`): an
error that is not promised, more than `CASE_S` of processor time for one input, or memory beyond libFuzzer's limit.
Linux only, as atheris is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["shoal"], enable_loader_override=False):
    from fuzz_targets import TARGETS

from fuzz_registry import Target
from fuzz_samples import mutated, packed, unpacked

CASE_S = 1.0
"""Processor seconds that one input may cost."""


class TooSlow(Exception):
    """One input took too long."""


def fuzz(one: Target, folder: Path, options: Sequence[str]) -> None:
    """Fuzz a target; does not return."""
    corpus = folder / f"{one.name}.corpus"
    corpus.mkdir()
    for number, seed in enumerate(one.seeds()):
        (corpus / str(number)).write_bytes(seed)
        one.answers(seed)  # What is made once is made before anything is timed.

    def run(data: bytes) -> None:
        before = time.process_time()
        one.answers(data)
        if time.process_time() - before > CASE_S:
            raise TooSlow(f"{time.process_time() - before:.1f} s of processor time")

    def change(data: bytes, most: int, seed: int) -> bytes:
        draw = Random(seed)
        if one.is_packed and len(data) > 1 and draw.random() < 0.5:
            value = unpacked(data[1:])
            changed = data[:1] + packed(mutated(value, draw))
            if 1 < len(changed) <= most:
                return changed
        return bytes(atheris.Mutate(data, most))

    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder / one.name}-", str(corpus)], run, custom_mutator=change
    )
    atheris.Fuzz()


def main() -> None:
    at = sys.argv.index("--")
    folder, names, options = Path(sys.argv[1]), sys.argv[2:at], sys.argv[at + 1 :]
    for name in names:
        child = os.fork()
        if child == 0:
            log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            fuzz(TARGETS[name], folder, options)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{name}.code").write_text(str(code))


if __name__ == "__main__":
    main()
