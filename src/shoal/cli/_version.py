"""`shoal _version RUN VERSION FOLDER`: write a published version of a run as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shoal.broadcast.tensors import TensorView

SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
"""What belongs to a checkpoint beside its weights."""


def run(folder: Path, version: int, target: Path, /) -> None:
    """Put a version's weights together. Started by the console's playground; not for people."""
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    from shoal.broadcast.image import read_version
    from shoal.broadcast.store import Store
    from shoal.config import load_config
    from shoal.engine.merging import merged
    from shoal.engine.source import INDEX, WEIGHTS, resolve
    from shoal.fabric.identity import Identity
    from shoal.rollout.host import model_cache

    trusted = Identity.load_or_create(folder / "identity" / "learner").public_key
    store = Store(folder / "snapshots", run=folder.name, trusted_key=trusted, read_only=True)
    base = resolve(load_config(str(folder / "config.toml"), []).model.name, model_cache())
    tensors = merged(base, read_version(store, "policy", version))
    target.mkdir()
    for pattern in SMALL_FILES:
        for path in base.directory.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, target / path.name)
    write_safetensors(target / WEIGHTS, tensors)


def write_safetensors(path: Path, tensors: Mapping[str, TensorView]) -> None:
    """The tensors in safetensors' format: a JSON header, its length before it, and the bytes one after the other.

    Not by the package itself: it copies all of them, or takes them as torch's, which only the engine knows.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, view in tensors.items():
        begin, end = end, end + view.num_bytes
        header[name] = {"dtype": view.dtype, "shape": view.shape, "data_offsets": [begin, end]}
    written = msgspec.json.encode(header)
    written += b" " * (-len(written) % 8)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little"))
        file.write(written)
        for view in tensors.values():
            file.write(view.data)
