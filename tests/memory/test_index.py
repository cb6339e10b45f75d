"""The index returns what the exact product would, keeps its lists straight, and survives a save."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.errors import CapacityError
from shoal.memory import index as index_module
from shoal.memory.embedding import HashedEmbedder
from shoal.memory.index import VectorIndex

DIMENSIONS = 32


def units(count: int, seed: int) -> NDArray[np.float32]:
    topics = np.random.default_rng(0).standard_normal((40, DIMENSIONS))
    draw = np.random.default_rng(seed)
    found = topics[draw.integers(40, size=count)] + 0.5 * draw.standard_normal((count, DIMENSIONS))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 60), k=st.integers(1, 12))
def test_small_indices_are_exact_after_any_change_of_weights(seed: int, count: int, k: int) -> None:
    draw = np.random.default_rng(seed)
    vectors, weights = units(count, seed), draw.choice([0.0, 0.2, 0.5, 1.0], count).astype(np.float32)
    index = VectorIndex(DIMENSIONS)
    for key in draw.permutation(count):
        index.add(int(key), vectors[key], 0.7)
    for key in draw.permutation(count):
        index.set_weight(int(key), float(weights[key]))
    query = units(1, seed + 1)[0]
    products = (vectors @ query) * weights
    wanted = sorted((i for i in range(count) if products[i] > 0), key=lambda i: (-products[i], i))[:k]
    found = index.search(query, k)
    assert [score for _, score in found] == pytest.approx([float(products[i]) for i in wanted], abs=1e-6)
    allowed = draw.random(count) < 0.5
    assert {key for key, _ in index.search(query, k, allowed=allowed)} <= set(np.flatnonzero(allowed))
    assert len(index) == count


def test_a_trained_index_finds_nearly_all_and_takes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "TRAIN_FROM", 1000)
    count = 5000
    vectors, weights = units(count, 1), np.random.default_rng(2).uniform(0.1, 1, count).astype(np.float32)
    index = VectorIndex(DIMENSIONS, scan=1500)
    for key in range(count):
        index.add(key, vectors[key], float(weights[key]))
    assert index.wants_training
    index.train()
    assert not index.wants_training and len(index) == count
    late = units(300, 3)
    for number, vector in enumerate(late):
        index.add(count + number, vector, 0.9)
    with pytest.raises(CapacityError):
        index.add(3, vectors[3], 1.0)
    everything, all_weights = np.vstack([vectors, late]), np.append(weights, np.full(300, 0.9, np.float32))
    index.position = 77
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")
    loaded = VectorIndex.load(tmp_path / "index", DIMENSIONS, scan=1500)
    assert loaded is not None and loaded.position == 77 and len(loaded) == count + 300
    loaded.set_weight(5, 0.0)
    hits = 0
    for query in units(50, 4):
        products = (everything @ query) * all_weights
        products[5] = 0
        exact = set(np.argsort(-products)[:10].tolist())
        found = [key for key, _ in loaded.search(query, 10)]
        hits += len(exact & set(found))
        assert 5 not in found
    assert hits >= 0.95 * 500


def test_a_damaged_index_is_not_used(tmp_path: Path) -> None:
    index = VectorIndex(DIMENSIONS)
    for key, vector in enumerate(units(20, 1)):
        index.add(key, vector, 0.5)
    index.save(tmp_path / "index")
    assert VectorIndex.load(tmp_path / "index", DIMENSIONS + 1) is None
    assert VectorIndex.load(tmp_path / "nowhere", DIMENSIONS) is None
    np.save(tmp_path / "index" / "keys.npy", np.zeros(20, np.int64))
    assert VectorIndex.load(tmp_path / "index", DIMENSIONS) is None, "one key twice"
    np.save(tmp_path / "index" / "keys.npy", np.arange(20, dtype=np.int64))
    assert VectorIndex.load(tmp_path / "index", DIMENSIONS) is not None
    (tmp_path / "index" / "vectors.npy").write_bytes(b"\x93NUMPY nonsense")
    assert VectorIndex.load(tmp_path / "index", DIMENSIONS) is None


def test_hashed_vectors_have_length_one_and_put_like_texts_near() -> None:
    embedder = HashedEmbedder()
    near, same, far, empty = embedder.embed(
        [
            "Write the carry above the next column.",
            "write the  CARRY above the next column",
            "The capital of France lies on the Seine.",
            "",
        ]
    )
    assert np.linalg.norm([near, same, far, empty], axis=1) == pytest.approx(1.0, abs=1e-5)
    assert near @ same > 0.99 and near @ far < 0.4
    assert (embedder.embed(["a b"]) == HashedEmbedder().embed(["a b"])).all()
