"""`shoal config`: look at configurations without starting anything."""

from __future__ import annotations

from typing import Any

from cyclopts import App

from shoal.cli.output import console, print_json
from shoal.cli.parameters import Json, Overrides
from shoal.config import Config, load_config, shipped_configs, to_toml

app = App(name="config", help="Check a configuration, or list those that come with Shoal.")


def show(config: Config, *, json: bool = False, **more: Any) -> None:
    """Print the resolved configuration, every default filled in: what `--dry-run` begins with."""
    if json:
        print_json({"config": config.model_dump(mode="json"), **more})
    else:
        console().print(to_toml(config, comments=True), markup=False, soft_wrap=True, end="")


@app.command
def check(config: str, /, *overrides: Overrides, json: Json = False) -> None:
    """Check a configuration and print it with every default filled in.

    For example:

        shoal config check configs/arithmetic.toml
        shoal config check arithmetic --learner.mode pull

    Args:
        config: A TOML file, or the name of a shipped configuration.
    """
    show(load_config(config, overrides), json=json)


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List the configurations that come with Shoal.

    For example:

        shoal config list
    """
    found = {name: str(path) for name, path in sorted(shipped_configs().items())}
    if json:
        print_json({"configs": found})
    else:
        for name, path in found.items():
            console().print(f"{name:24}{path}", markup=False, soft_wrap=True)
