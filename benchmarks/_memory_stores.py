"""A million vectors with weights against the exact product; a store's writer killed again and again.

As a program it is that writer: it adds entries to the file that it is given, and says which are safe.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError
from shoal.memory.events import Added, Used
from shoal.memory.index import VectorIndex
from shoal.memory.records import Entry, Provenance
from shoal.memory.store import Store

DIMENSIONS = 384
K = 10
FAMILY = "stored"


def clustered(count: int, draw: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors around topics of about 200 each, and 500 queries around the same topics."""
    topics = draw.standard_normal((max(1, count // 200), DIMENSIONS), dtype=np.float32)
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)

    def around(number: int) -> NDArray[np.float32]:
        made = np.empty((number, DIMENSIONS), np.float32)
        for start in range(0, number, 16_384):
            part = made[start : start + 16_384]
            part[:] = draw.standard_normal(part.shape, dtype=np.float32) * (0.8 / DIMENSIONS**0.5)
            part += topics[draw.integers(len(topics), size=len(part))]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return made

    return around(count), around(500)


def timed(calls: Iterator[Any]) -> tuple[list[Any], float, float]:
    """What the calls gave, and the 95th percentile of their wall and processor times in ms."""
    results, walls, cpus = [], [], []
    while True:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            results.append(next(calls))
        except StopIteration:
            break
        walls.append(time.perf_counter() - wall)
        cpus.append(time.thread_time() - cpu)
    return results, 1000 * float(np.percentile(walls, 95)), 1000 * float(np.percentile(cpus, 95))


def retrieval(folder: Path, count: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    draw = np.random.default_rng(1)
    vectors, queries = clustered(count, draw)
    weights = draw.uniform(0.05, 1.0, count).astype(np.float32)
    started = time.perf_counter()
    index = VectorIndex(DIMENSIONS)
    index.build(vectors, np.arange(count, dtype=np.int64), weights)
    build_s = time.perf_counter() - started
    truth, exact_ms, exact_cpu = timed(exact(vectors, weights, queries[:100]))
    for q in queries[100:120]:
        index.search(q, K)  # pages of the slab come in
    found = [index.search(q, K) for q in queries[:100]]
    recall = float(np.mean([len(set(t) & {key for key, _ in f}) / K for t, f in zip(truth, found, strict=True)]))
    _, wall, cpu = timed(index.search(q, K) for q in queries)
    extra = clustered(2_000, draw)[0]
    _, add_wall, add_cpu = timed(index.add(count + n, v, 0.5) for n, v in enumerate(extra))
    _, weight_wall, _ = timed(index.set_weight(int(k), 0.3) for k in draw.integers(count, size=2_000))
    index.save(folder / "index")
    started = time.perf_counter()
    loaded = VectorIndex.load(folder / "index", DIMENSIONS)
    assert loaded is not None and len(loaded) == count + len(extra)
    first = time.perf_counter()
    loaded.search(queries[0], K)
    open_s, first_s = first - started, time.perf_counter() - first
    same = {"part": "retrieval", "count": count}
    rows += [
        {**same, "case": "exact product, numpy", "p95_ms": exact_ms, "cpu": exact_cpu, "recall": 1.0},
        {**same, "case": "this index", "p95_ms": wall, "cpu": cpu, "recall": recall, "build_s": build_s},
        {**same, "case": "opened from disk", "open_s": open_s, "first_query_s": first_s},
    ]
    return {
        "vectors": float(count),
        "retrieve_p95_ms": wall,
        "retrieve_p95_ms_cpu": cpu,
        "recall_at_10": recall,
        "add_p95_ms": add_wall,
        "add_p95_ms_cpu": add_cpu,
        "reweigh_p95_ms": weight_wall,
        "index_open_s": open_s,
    }


def exact(vectors: NDArray[np.float32], weights: NDArray[np.float32], queries: NDArray[np.float32]) -> Iterator[Any]:
    for query in queries:
        scores = (vectors @ query) * weights
        best = np.argpartition(-scores, K)[:K]
        yield [int(i) for i in best]


def write_for_ever(path: Path) -> None:
    """The writer that gets killed: it acknowledges each record on standard output."""
    with Store(path, "writer") as store:
        number = store.position
        while True:
            number += 1
            entry = Entry(text=f"entry {number}", family=FAMILY, provenance=Provenance(rule="manual"))
            events = store.record(Added(entry=entry), Used(entry=entry.id, utility=0.5, share=0.0))
            sys.stdout.write(" ".join(event.id for event in events) + "\n")
            sys.stdout.flush()


def stored(folder: Path, kills: int, entries: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    draw = random.Random(3)
    path = folder / "killed.db"
    acknowledged: set[str] = set()
    for _ in range(kills):
        command = [sys.executable, __file__, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged.update(writer.stdout.readline().split())
            time.sleep(draw.uniform(0, 0.3))
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                if line.endswith("\n"):
                    acknowledged.update(line.split())
    if len(acknowledged) < 2 * kills:
        raise RunError("The writers that were to be killed wrote nothing.", "Their own output above says why.")
    with Store(path, "n") as store:
        kept = store.ids_since(0)
        lost = len(acknowledged - set(kept))
        torn = len(kept) % 2
        whole = {m.id: m for m in store.memories()} == store.state_at(store.position)
    big = folder / "big.db"
    with Store(big, "n") as store:
        for start in range(0, entries, 1000):
            store.record(
                *(
                    Added(
                        entry=Entry(text=f"entry {n} says {n * n}", family=FAMILY, provenance=Provenance(rule="manual"))
                    )
                    for n in range(start, min(entries, start + 1000))
                )
            )
        fresh = (Entry(text=f"another {n}", family=FAMILY, provenance=Provenance(rule="manual")) for n in range(200))
        _, add_wall, add_cpu = timed(store.record(Added(entry=entry)) for entry in fresh)
    started = time.perf_counter()
    with Store(big, "n") as store:
        held = store.held()
        open_s = time.perf_counter() - started
    rows.append(
        {
            "part": "store",
            "case": f"{kills} kills",
            "count": len(acknowledged),
            "lost": lost,
            "torn": torn,
            "whole": whole,
        }
    )
    rows.append({"part": "store", "case": "opened", "count": entries, "open_s": open_s, "active": held[0]})
    return {
        "acknowledged": float(len(acknowledged)),
        "lost_after_kill": float(lost + torn + (not whole)),
        "store_add_p95_ms": add_wall,
        "store_add_p95_ms_cpu": add_cpu,
        "store_open_s": open_s,
    }


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
