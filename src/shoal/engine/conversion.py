"""GGUF to a bf16 checkpoint directory that anything reads, made once and kept.

Invariants: a conversion is complete or not there at all (written beside, then renamed) and carries the BLAKE3 hash of
each of its files; one whose files are not what was written is made again; processes that want the same conversion
wait for the one that makes it.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError

from shoal.errors import ModelError, StorageError

HASHES = "hashes.json"

LOCK_TIMEOUT_S = 1800.0
"""Longer than any download and conversion: whoever holds the lock until then hangs."""

LOCK_POLL_S = 0.2


def cached(target: Path, progress: Callable[[str], None], gguf: Callable[[Path], Path]) -> Path:
    """The conversion at `target`, made now if it is not there or not intact.

    Args:
        gguf: gives the file to convert; it may download it into the directory it is handed.

    Raises:
        ModelError: there is nothing to convert, or it is no GGUF that can be read.
        StorageError: the cache cannot be written.
    """
    if is_intact(target):
        return target
    with _locked(target.parent, progress):
        if is_intact(target):
            return target
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as scratch:
                return _convert(gguf(Path(scratch)), Path(scratch) / "converted", target, progress)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"the model cannot be written to {target}: {reason}.", "Free some space.") from None


def is_intact(directory: Path) -> bool:
    """Whether a conversion is there and is what was written."""
    try:
        hashes = json.loads((directory / HASHES).read_text())
        return bool(hashes) and all(file_hash(directory / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def file_hash(path: Path) -> str:
    """BLAKE3 of a file's bytes, in hex."""
    return blake3(max_threads=1).update_mmap(path).hexdigest()


def _convert(gguf: Path, made: Path, target: Path, progress: Callable[[str], None]) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress("converting the model to bf16 (half a minute, once)")
    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **place)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **place)
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(f"{gguf} cannot be read as GGUF: {reason}.", "Fetch it again.") from None
        # What marks the model as quantised would make save_pretrained refuse; its tensors are plain bf16 by now.
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    del model
    gc.collect()
    hashes = {path.name: file_hash(path) for path in sorted(made.iterdir())}
    (made / HASHES).write_text(json.dumps(hashes, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(made, target)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of `transformers`: the caller has its own way to say what goes on."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The one bar that does not listen to the library's own switch.
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _locked(cache: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """One process at a time converts into this cache; the lock goes with its holder, also when that is killed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / "lock").open("w")
    except OSError as error:
        raise StorageError(
            f"the model cache {cache} cannot be written: {error.strerror}.", "Set SHOAL_HOME to a writable directory."
        ) from None
    with file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        waited = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"another process holds {cache / 'lock'} for {LOCK_TIMEOUT_S:.0f} s.", "End it, then try again."
                    ) from None
                if not waited:
                    progress("another process prepares the model; waiting for it")
                    waited = True
                time.sleep(LOCK_POLL_S)
        yield
