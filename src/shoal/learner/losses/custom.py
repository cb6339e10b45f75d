"""A policy-gradient loss of the user's own, named as `package.module:function`.

    def function(inputs: TokenInputs, options: Mapping[str, float]) -> Tensor | tuple[Tensor, Tensor]

It gives one loss a trained token, [N], with gradient; and, if it likes, where it removed the gradient ([N], bool; for
the statistics). Normalisation and the KL penalty are added as to any other loss.

Invariant: what comes back has the shape of the tokens and is floating point; whatever else it is, the trainer's own
checks hold (a loss that is not finite changes nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from shoal.config.learner import CustomLoss
from shoal.errors import ConfigError
from shoal.learner.losses.common import LossOutput, TokenInputs, reduce


@lru_cache(maxsize=16)
def find_loss(path: str) -> Callable[..., Any]:
    """The function that `path` names; raises `ConfigError` where there is none."""
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the loss '{path}' cannot be imported: {error}.", "Give it as package.module:function."
        ) from None
    if not callable(function):
        raise ConfigError(f"the loss '{path}' is not a function.", "Give it as package.module:function.")
    return function


def custom_loss(inputs: TokenInputs, settings: CustomLoss, entropy: Tensor | None = None) -> LossOutput:
    """This micro-batch's share of the step's loss; `entropy` [N] goes into the statistics only.

    Raises:
        ConfigError: the function gave something else than a loss a token.
    """
    found = find_loss(settings.function)(inputs, settings.options)
    losses, removed = found if isinstance(found, tuple) else (found, None)
    if not isinstance(losses, Tensor) or losses.shape != inputs.logprobs.shape or not losses.is_floating_point():
        raise ConfigError(f"the loss '{settings.function}' must give one loss for each of the trained tokens.")
    if removed is None:
        removed = torch.zeros_like(losses, dtype=torch.bool)
    return reduce(inputs, losses, removed, settings, None, entropy)
