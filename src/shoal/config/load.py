"""Reading a configuration: a TOML file, then overrides, then one validation.

Whatever is wrong ends in one `ConfigError`; a configuration that loads is complete and consistent.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.config.explain import Source, explain
from shoal.config.overrides import Override, apply_overrides, parse_overrides
from shoal.config.root import Config
from shoal.config.toml import NoToml, tables_of
from shoal.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""A larger file is not a configuration."""

_SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[3] / "configs")
"""Where the configurations that come with Shoal lie: inside an installed wheel, or in a checkout."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path`, with command-line overrides applied.

    Args:
        path: a TOML file, or the bare name of a shipped configuration such as `arithmetic`.
        overrides: arguments such as `["--learner.lr", "2e-6", "--run.steps=10"]`.

    Raises:
        ConfigError: the file is missing or no TOML, or a key, value, combination or override cannot be used.
    """
    file = find_config(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The configuration {file} cannot be read: {error.strerror}.", "Check the path.") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{file} has {len(raw)} bytes.", f"A configuration has at most {MAX_FILE_BYTES}.")
    try:
        text = raw.decode("utf-8")
        data = tables_of(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except NoToml as error:
        raise ConfigError(f"{file} is not valid TOML: {_lower_first(str(error))}.", "Correct that line.") from None
    return _validate(data, str(file), text, parse_overrides(overrides))


def config_from(data: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "the configuration") -> Config:
    """The configuration in raw tables that did not come from a file; raises as `load_config` does."""
    return _validate(dict(data), name, "", parse_overrides(overrides))


def find_config(path: str | Path) -> Path:
    """The file meant by `path`: itself, or the shipped configuration of that name.

    Raises:
        ConfigError: there is neither.
    """
    file = Path(path)
    if file.exists():
        return file
    shipped = shipped_configs()
    if str(path) in shipped:
        return shipped[str(path)]
    beside = [str(found) for found in file.parent.glob("*.toml")] if file.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*beside, *shipped], n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]}?" if close else f"Give a TOML file, or one of: {', '.join(sorted(shipped))}."
    raise ConfigError(f"There is no configuration {path}.", hint)


def shipped_configs() -> dict[str, Path]:
    """Name to file of the configurations that come with Shoal."""
    return {file.stem: file for folder in reversed(_SHIPPED) for file in sorted(folder.glob("*.toml"))}


def _validate(data: dict[str, Any], name: str, text: str, overrides: Sequence[Override]) -> Config:
    tables = apply_overrides(data, overrides)
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise explain(error, tables, Source(name, text, overrides)) from None


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
