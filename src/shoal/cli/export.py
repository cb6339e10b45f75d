"""`shoal export`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json


def run(
    model: str,
    output: Path,
    /,
    *,
    weights: Literal["bf16", "f16", "f32", "q8_0"] = "bf16",
    json: Json = False,
) -> None:
    """Write a run's model, or any other, for llama.cpp (OUTPUT ends in .gguf) or as a Hugging Face folder.

    For example:

        shoal export runs/NAME model.gguf --weights q8_0
        shoal export runs/NAME my-model/

    Args:
        model: A run's folder, embedded, a directory, a .gguf file or a hub name.
        output: A file that ends in .gguf, or a folder; neither may be there yet.
        weights: Type of a GGUF file's matrices.
    """
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    folder = Path(model).expanduser()
    if (folder / "config.toml").is_file() and (folder / "model").is_dir():
        model = str(folder / "model")
    found = resolve(model, model_cache(), note)
    if output.suffix == ".gguf":
        from shoal.engine.gguf_writing import write_gguf

        num_bytes = write_gguf(found, output, weights)
    else:
        num_bytes = copied(found.directory, output)
    if json:
        print_json({"path": str(output), "bytes": num_bytes})
    else:
        console().print(f"{output}: {num_bytes / 1e6:.1f} MB", soft_wrap=True, markup=False)


def copied(source: Path, target: Path) -> int:
    """A checkpoint's folder under another name, whole or not at all; gives its bytes."""
    import os
    import shutil

    from shoal.errors import StorageError

    if target.exists():
        raise StorageError(f"{target} is there already.", "Remove it, or give another name.")
    made = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copytree(source, made, ignore=shutil.ignore_patterns("hashes.json", ".*"))
        os.replace(made, target)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise StorageError(f"{target} cannot be written: {error.strerror or error}.", "Free some space.") from None
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
