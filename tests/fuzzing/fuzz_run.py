"""Fuzz one target under a fuzzer that follows coverage (atheris, libFuzzer underneath).

    python tests/fuzzing/fuzz_run.py change /tmp/corpus -runs=50000 -seed=1 -artifact_prefix=/tmp/found/

The corpus is a folder that is there; seeds are written into it. Exits with 0 after that many runs; a crash, a case of
more than `CASE_S` of processor time, or memory beyond libFuzzer's limit (`-rss_limit_mb`) ends it otherwise, the case
kept under the prefix. Linux only, as atheris is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

import atheris

CASE_S = 1.0
"""Processor seconds that one input may cost."""


class TooSlow(Exception):
    """One input took too long."""


def main() -> None:
    with atheris.instrument_imports(include=["shoal"], enable_loader_override=False):
        import fuzz_targets
    from fuzz_samples import mutated, packed, unpacked

    name, corpus, *options = sys.argv[1:]
    one = fuzz_targets.TARGETS[name]
    for number, seed in enumerate(one.seeds()):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
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

    atheris.Setup([sys.argv[0], *options, corpus], run, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
