"""Parameters that several commands share, so that each is spelled and documented once."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object instead of text.")]
"""Every command takes `json: Json = False`, and then prints nothing else to standard output."""

Flag = Annotated[bool, Parameter(negative="")]
"""A switch without a `--no-` form."""

Overrides = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Keys of the configuration to change, such as --learner.lr 2e-6 or --run.steps=10.",
    ),
]
"""For `*overrides: Overrides`: whatever the command does not know itself, handed to `load_config`."""
