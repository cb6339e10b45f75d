"""One run's configuration: a pydantic model for each TOML section, read, overridden, checked and written here.

    config = load_config("configs/arithmetic.toml", ["--learner.lr", "2e-6"])
    print(to_toml(config, comments=True))

`root.Config` is the whole; `learner` and `sections` hold its parts; `load` reads, `overrides` applies the command
line's, `explain` turns every mistake into one paragraph, `write` writes. Invariants: a configuration that loads is
complete and consistent; reading what was written gives an equal one. Imports no torch and no other room.
"""

from shoal.config.learner import (
    Advantage,
    AsyncLearner,
    BehaviourImportance,
    ColocatedLearner,
    CustomLoss,
    GrpoLoss,
    GspoLoss,
    Importance,
    Learner,
    Lora,
    Loss,
    Normalisation,
    ProximalImportance,
    PullLearner,
)
from shoal.config.load import config_from, find_config, load_config, shipped_configs
from shoal.config.loop import Loop
from shoal.config.root import Config
from shoal.config.sections import (
    Budget,
    Capacity,
    Environment,
    Eval,
    Model,
    Network,
    Output,
    Rollout,
    Run,
    Serving,
    Workers,
    is_loopback,
)
from shoal.config.write import to_toml

__all__ = [
    "Advantage",
    "AsyncLearner",
    "BehaviourImportance",
    "Budget",
    "Capacity",
    "ColocatedLearner",
    "Config",
    "CustomLoss",
    "Environment",
    "Eval",
    "GrpoLoss",
    "GspoLoss",
    "Importance",
    "Learner",
    "Loop",
    "Lora",
    "Loss",
    "Model",
    "Network",
    "Normalisation",
    "Output",
    "ProximalImportance",
    "PullLearner",
    "Rollout",
    "Run",
    "Serving",
    "Workers",
    "config_from",
    "find_config",
    "is_loopback",
    "load_config",
    "shipped_configs",
    "to_toml",
]
