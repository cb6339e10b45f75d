"""What a published version costs: bytes and seconds of Shoal's change codec beside what else one could send.

The versions are real: consecutive ones of short GRPO runs of the embedded model on its arithmetic, one at each
learning rate (`shoal train`, two optimizer steps after the first version), or of runs that are there already. Times
are processor seconds of one thread, so that neighbours do not count; the publication is timed both ways, in turns.

    shoal bench codec --json
    shoal bench codec -- --runs runs/demo-seed0-20261122-172628     # the newest versions of a run's own store
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from blake3 import blake3

from shoal.broadcast.delta import apply_change, encode_change
from shoal.broadcast.image import read_version
from shoal.broadcast.publisher import SnapshotWriter, write_snapshot
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import RunError
from shoal.fabric.identity import Identity
from shoal.protocol.snapshot import DTYPE_BYTES

from _common import benchmark, emit

RATES = ("1e-6", "2e-5")
STEPS = 3
ROUNDS = 3
CONFIG = Path(__file__).parents[1] / "configs" / "arithmetic.toml"
LIMIT_S = 3600.0

Tensors = dict[str, TensorView]


class Coded(NamedTuple):
    """One way to send `new` to who holds `old`."""

    num_bytes: int
    encode_s: float
    decode_s: float


def train(rate: str, folder: Path) -> Path:
    """A short run at a learning rate; gives its folder."""
    changes = {
        "--run.name": f"lr{rate}",
        "--run.dir": str(folder),
        "--run.steps": str(STEPS),
        "--learner.lr": rate,
        "--learner.warmup_steps": "0",
        "--learner.checkpoint_every": "0",
        "--eval.before": "false",
        "--eval.after": "false",
        "--output.plots": "false",
    }
    command = [sys.executable, "-m", "shoal.cli", "train", str(CONFIG)]
    command += [part for change in changes.items() for part in change]
    subprocess.run(command, check=True, stdout=sys.stderr.fileno(), timeout=LIMIT_S)
    return folder / f"lr{rate}"


def newest_two(run: Path) -> tuple[int, Tensors, Tensors]:
    """The last version that changed anything, and the one before it."""
    learner = Identity.load_or_create(run / "identity" / "learner")
    store = Store(run / "snapshots", run=run.name, trusted_key=learner.public_key, read_only=True)
    versions = store.versions("policy")
    for old, new in reversed(list(pairwise(versions))):
        published = store.manifest("policy", new)
        if published is not None and published.manifest.change and published.manifest.change.num_bytes:
            return new, read_version(store, "policy", old), read_version(store, "policy", new)
    raise RunError(f"{run} has no two versions that differ.", "Give a run that published changes.")


def cpu_s(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came of it."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def shoal(old: Tensors, new: Tensors) -> Coded:
    """Positions and steps, and the hash of each tensor on either side."""

    def encode() -> dict[str, bytes]:
        for view in new.values():
            blake3(view.data).digest()
        return {n: encode_change(old[n].data, v.data, DTYPE_BYTES[v.dtype]).data for n, v in new.items()}

    encode_s, sent = cpu_s(encode)
    image = {name: bytearray(view.data) for name, view in old.items()}

    def decode() -> None:
        for name, change in sent.items():
            apply_change(memoryview(change), memoryview(image[name]), DTYPE_BYTES[new[name].dtype])
            blake3(image[name]).digest()

    decode_s, _ = cpu_s(decode)
    assert all(image[name] == view.data for name, view in new.items())
    return Coded(sum(map(len, sent.values())), encode_s, decode_s)


def overwrite(old: Tensors, new: Tensors) -> Coded:
    """Positions and new values: gaps as 32-bit numbers, values as they are, both in byte planes, zstd level 1."""
    packer, opener = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def planes(numbers: np.ndarray[Any, Any]) -> bytes:
        table = numbers.view(np.uint8).reshape(len(numbers), numbers.itemsize)
        return b"".join(np.ascontiguousarray(table[:, i]).tobytes() for i in range(numbers.itemsize))

    def encode() -> dict[str, tuple[bytes, bytes]]:
        sent = {}
        for name, view in new.items():
            before, after = np.frombuffer(old[name].data, np.uint16), np.frombuffer(view.data, np.uint16)
            places = np.flatnonzero(before != after)
            gaps = np.diff(places, prepend=-1).astype(np.uint32)
            sent[name] = packer.compress(planes(gaps)), packer.compress(planes(after[places]))
        return sent

    encode_s, sent = cpu_s(encode)
    image = {name: np.frombuffer(view.data, np.uint16).copy() for name, view in old.items()}

    def decode() -> None:
        for name, (gaps, values) in sent.items():
            table = np.frombuffer(opener.decompress(gaps), np.uint8).reshape(4, -1).T.copy()
            places = np.cumsum(table.reshape(-1).view(np.uint32)) - 1
            pairs = np.frombuffer(opener.decompress(values), np.uint8).reshape(2, -1).T.copy()
            image[name][places] = pairs.reshape(-1).view(np.uint16)

    decode_s, _ = cpu_s(decode)
    assert all(np.array_equal(image[name], np.frombuffer(view.data, np.uint16)) for name, view in new.items())
    return Coded(sum(len(a) + len(b) for a, b in sent.values()), encode_s, decode_s)


def stream(tensors: Tensors) -> bytes:
    return b"".join(view.data for view in tensors.values())


def whole_zstd(old: Tensors, new: Tensors) -> Coded:
    """All new bytes, zstd level 1."""
    data = stream(new)
    encode_s, sent = cpu_s(lambda: zstandard.ZstdCompressor(level=1).compress(data))
    decode_s, _ = cpu_s(lambda: zstandard.ZstdDecompressor().decompress(sent))
    return Coded(len(sent), encode_s, decode_s)


def xor_zstd(old: Tensors, new: Tensors) -> Coded:
    """Old bytes xor new bytes, zstd level 1."""
    before, after = (np.frombuffer(stream(t), np.uint8) for t in (old, new))
    encode_s, sent = cpu_s(lambda: zstandard.ZstdCompressor(level=1).compress((before ^ after).data))
    decode_s, _ = cpu_s(lambda: before ^ np.frombuffer(zstandard.ZstdDecompressor().decompress(sent), np.uint8))
    return Coded(len(sent), encode_s, decode_s)


def patch_zstd(old: Tensors, new: Tensors) -> Coded:
    """`zstd --patch-from`: the old bytes as dictionary, long-distance matching, level 1."""
    before, after = stream(old), stream(new)
    window = max(20, (len(before) + len(after)).bit_length())
    known = zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    how = zstandard.ZstdCompressionParameters.from_level(1, window_log=min(31, window), enable_ldm=True)
    encode_s, sent = cpu_s(lambda: zstandard.ZstdCompressor(dict_data=known, compression_params=how).compress(after))
    opener = zstandard.ZstdDecompressor(dict_data=known, max_window_size=2**31)
    decode_s, _ = cpu_s(lambda: opener.decompress(sent, max_output_size=len(after)))
    return Coded(len(sent), encode_s, decode_s)


def publishing(old: Tensors, new: Tensors) -> dict[str, float]:
    """Processor seconds of a publication, whole and as a change, by turns into stores of their own; median."""
    identity = Identity.generate()
    took: dict[str, list[float]] = {"whole": [], "change": []}
    with tempfile.TemporaryDirectory(prefix="shoal-codec-") as scratch:
        stores = {
            kind: Store(Path(scratch) / kind, run="codec", trusted_key=identity.public_key, durable=False)
            for kind in took
        }
        writer = SnapshotWriter(stores["change"], identity, "policy")
        writer.write(0, old)
        for turn in range(2 * ROUNDS):
            tensors = (new, old)[turn % 2]
            for kind, store in stores.items():
                started = time.process_time()
                if kind == "whole":
                    write_snapshot(store, identity, "policy", turn + 1, tensors)
                else:
                    writer.write(turn + 1, tensors)
                store.prune("policy", 1)  # or the whole versions would find their chunks there already
                took[kind].append(time.process_time() - started)
    return {kind: statistics.median(seconds) for kind, seconds in took.items()}


WAYS: Mapping[str, Callable[[Tensors, Tensors], Coded]] = {
    "shoal": shoal,
    "new values": overwrite,
    "xor, zstd": xor_zstd,
    "zstd --patch-from": patch_zstd,
    "whole, zstd": whole_zstd,
}


def rows_of_run(run: Path) -> list[dict[str, Any]]:
    """What the run itself noted of each step."""
    rate = _rate_of(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "run": run.name,
            "lr": rate,
            "step": line["step"],
            "changed": line["snapshot_changed"],
            "bytes": line["snapshot_bytes"],
            "publish_s": line["publish_s"],
        }
        for line in lines
        if "snapshot_bytes" in line and line.get("applied", 1)
    ]


def _rate_of(run: Path) -> float:
    return float(tomllib.loads((run / "config.toml").read_text())["learner"]["lr"])


def measure(runs: list[Path]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and headline."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for run in runs:
        version, old, new = newest_two(run)
        whole = sum(view.num_bytes for view in new.values())
        noted = rows_of_run(run)
        rows += noted
        ratio = statistics.median(row["bytes"] for row in noted) / whole
        headline[f"delta_bytes_ratio_lr_{_rate_of(run):g}"] = ratio
        coded = {name: way(old, new) for name, way in WAYS.items()}
        for name, cost in coded.items():
            rows.append(
                {
                    "run": run.name,
                    "version": version,
                    "codec": name,
                    "bytes": cost.num_bytes,
                    "of_whole": cost.num_bytes / whole,
                    "encode_mb_per_s": whole / 1e6 / cost.encode_s,
                    "decode_mb_per_s": whole / 1e6 / cost.decode_s,
                }
            )
        mine = coded["shoal"]
        headline["encode_mb_per_s"] = min(headline.get("encode_mb_per_s", 1e9), whole / 1e6 / mine.encode_s)
        headline["decode_mb_per_s"] = min(headline.get("decode_mb_per_s", 1e9), whole / 1e6 / mine.decode_s)
        headline["new_values_over_ours"] = coded["new values"].num_bytes / mine.num_bytes
        seconds = publishing(old, new)
        headline |= {"publish_whole_cpu_s": seconds["whole"], "publish_change_cpu_s": seconds["change"]}
    slowest = min(runs, key=_rate_of)
    headline["delta_bytes_ratio"] = headline[f"delta_bytes_ratio_lr_{_rate_of(slowest):g}"]
    return rows, headline


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="*", type=Path, help="folders of runs, instead of new ones")
    parser.add_argument("--rates", nargs="*", default=RATES, help="learning rates of the new runs")
    options = parser.parse_args()
    if options.runs:
        emit(*measure([run.resolve() for run in options.runs]))
        return
    with tempfile.TemporaryDirectory(prefix="shoal-codec-runs-") as scratch:
        emit(*measure([train(rate, Path(scratch)) for rate in options.rates]))


if __name__ == "__main__":
    benchmark(main)
