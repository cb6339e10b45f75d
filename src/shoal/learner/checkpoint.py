"""What a killed learner resumes from: weights, optimizer, version and random state, on disk, whole or not at all.

    checkpoints/
      step-000010/  weights.safetensors  optimizer.safetensors  checkpoint.json  (and the caller's own files)
      step-000020/  …

A checkpoint is written into a hidden directory beside the others, flushed to the disk, and renamed; `checkpoint.json`
is written last and names every file with its size and BLAKE3 hash, and its own hash.

Invariants: whatever `load_latest` returns was written completely and has not changed since; a damaged checkpoint is
passed over for the one before it, with a warning; a writer killed at any moment leaves the previous ones usable;
nothing read here is ever unpickled.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import RecordError, StorageError
from shoal.protocol.codec import Record, from_json, to_json

SCHEMA_VERSION = 1
"""Rises when what a checkpoint holds changes; another version's checkpoint is refused in words."""

MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"

PREFIX = "step-"
SCRATCH = ".saving-"

FREE_BYTES_MARGIN = 64 * 2**20
"""Left free on the disk beyond the checkpoint itself, for logs and metrics."""


class FileEntry(Record, frozen=True):
    """One file of a checkpoint."""

    name: str
    size: int
    hash: str
    """BLAKE3, hexadecimal."""


class RandomState(Record, frozen=True):
    """The generators' states as plain numbers."""

    torch: bytes
    cuda: tuple[bytes, ...]
    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[tuple[int, ...], int, int, float]

    @staticmethod
    def capture() -> RandomState:
        """The state of torch's, Python's and NumPy's global generators."""
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        assert name == "MT19937", "the global generator is always a Mersenne Twister"
        return RandomState(
            torch=torch.get_rng_state().numpy().tobytes(),
            cuda=tuple(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all())
            if torch.cuda.is_available()
            else (),
            python=random.getstate(),
            numpy=(tuple(int(k) for k in keys), int(position), int(has_gauss), float(gauss)),
        )

    def restore(self) -> None:
        """Put the generators back; a GPU's only where as many GPUs are there."""
        torch.set_rng_state(_bytes_tensor(self.torch))
        if self.cuda and torch.cuda.is_available() and torch.cuda.device_count() == len(self.cuda):
            torch.cuda.set_rng_state_all([_bytes_tensor(state) for state in self.cuda])
        random.setstate(self.python)
        keys, position, has_gauss, gauss = self.numpy
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))


class CheckpointManifest(Record, frozen=True):
    """`checkpoint.json`."""

    schema: int
    version: int
    """The policy version that was saved."""
    files: tuple[FileEntry, ...]
    random: RandomState
    hash: str = ""
    """BLAKE3 of this record's JSON with an empty hash."""

    def sealed(self) -> CheckpointManifest:
        """The same with its hash filled in."""
        bare = msgspec.structs.replace(self, hash="")
        return msgspec.structs.replace(bare, hash=blake3(to_json(bare)).hexdigest())

    def check(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise RecordError(f"the checkpoint has schema {self.schema}, and this Shoal reads {SCHEMA_VERSION}.")
        if self.sealed().hash != self.hash:
            raise RecordError("the checkpoint's own hash does not fit its content.")
        if self.version < 0 or any(Path(entry.name).name != entry.name for entry in self.files):
            raise RecordError("the checkpoint has a negative version or a file outside its directory.")


@dataclass(frozen=True)
class Checkpoint:
    """Everything in one checkpoint.

    `weights` are the trained parameters by name (with LoRA the adapters'), `optimizer` the flat state of
    `MasterAdamW`, `extra` small files of the caller's own, byte for byte.
    """

    version: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: RandomState = field(default_factory=RandomState.capture)
    extra: Mapping[str, bytes] = field(default_factory=dict)


def save(root: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint below `root` and remove all but the `keep` newest; returns its directory.

    Raises:
        StorageError: the disk is full or can't be written; what was there before is untouched.
    """
    target = path_of(root, checkpoint.version)
    scratch = root / f"{SCRATCH}{checkpoint.version:06d}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_scratch(root)
        _check_room(root, checkpoint)
        scratch.mkdir()
        _write(scratch, checkpoint)
        if target.exists():
            # A resumed run may make a version again; a directory can't be renamed over a full one.
            os.rename(target, root / f"{SCRATCH}old-{checkpoint.version:06d}-{os.getpid()}")
        os.rename(scratch, target)
        _sync(root)
        for old in _directories(root)[keep:]:
            shutil.rmtree(old)
        _remove_scratch(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"checkpoint {target} can't be written: {reason}.",
            "Free some space, or set learner.keep_checkpoints lower; the checkpoint before it is still good.",
        ) from error
    return target


def path_of(root: Path, version: int) -> Path:
    """Where the checkpoint of a version lies."""
    return root / f"{PREFIX}{version:06d}"


def load_latest(root: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint below `root`, or None where there is none at all.

    A damaged one is passed over with a `UserWarning`.

    Raises:
        StorageError: there are checkpoints and every one of them is damaged.
    """
    problems: list[str] = []
    for directory in _directories(root):
        try:
            return load(directory)
        except StorageError as error:
            problems.append(error.problem)
            warnings.warn(f"{error.problem} Trying the checkpoint before it.", stacklevel=2)
    if problems:
        raise StorageError(f"no checkpoint in {root} can be used. {problems[0]}", "Start a new run.")
    return None


def load(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`, verified.

    Raises:
        StorageError: it is incomplete or damaged.
    """
    try:
        manifest = from_json((directory / MANIFEST).read_bytes(), CheckpointManifest)
        for entry in manifest.files:
            if _entry(directory / entry.name) != entry:
                raise StorageError(f"{directory / entry.name} is not what was written.")
        own = (WEIGHTS, OPTIMIZER)
        return Checkpoint(
            version=manifest.version,
            weights=load_file(directory / WEIGHTS),
            optimizer=load_file(directory / OPTIMIZER),
            random=manifest.random,
            extra={e.name: (directory / e.name).read_bytes() for e in manifest.files if e.name not in own},
        )
    except (OSError, RecordError, SafetensorError) as error:
        raise StorageError(f"checkpoint {directory} is damaged: {str(error).rstrip('.')}.") from None


def _write(scratch: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in ((WEIGHTS, checkpoint.weights), (OPTIMIZER, checkpoint.optimizer)):
        save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, scratch / name)
    for name, data in checkpoint.extra.items():
        assert Path(name).name == name and name not in (WEIGHTS, OPTIMIZER, MANIFEST), name
        (scratch / name).write_bytes(data)
    files = []
    for path in sorted(scratch.iterdir()):
        _sync(path)
        files.append(_entry(path))
    manifest = CheckpointManifest(
        schema=SCHEMA_VERSION, version=checkpoint.version, files=tuple(files), random=checkpoint.random
    )
    (scratch / MANIFEST).write_bytes(to_json(manifest.sealed()))
    _sync(scratch / MANIFEST)
    _sync(scratch)


def _check_room(root: Path, checkpoint: Checkpoint) -> None:
    """Fail before gigabytes are written, not after."""
    tensors = [*checkpoint.weights.values(), *checkpoint.optimizer.values()]
    needed = sum(t.numel() * t.element_size() for t in tensors) + sum(map(len, checkpoint.extra.values()))
    free = shutil.disk_usage(root).free
    if free < needed + FREE_BYTES_MARGIN:
        raise OSError(0, f"it needs {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left")


def _directories(root: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def _remove_scratch(root: Path) -> None:
    """What a killed writer left behind; there is one writer to a run."""
    for path in root.glob(f"{SCRATCH}*"):
        shutil.rmtree(path)


def _entry(path: Path) -> FileEntry:
    hasher = blake3(max_threads=blake3.AUTO).update_mmap(path)
    return FileEntry(name=path.name, size=path.stat().st_size, hash=hasher.hexdigest())


def _sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
