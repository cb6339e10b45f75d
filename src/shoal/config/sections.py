"""All sections but `[learner]`, in the order in which a configuration names them.

The values of a section are checked here where one section is enough to know that they are wrong; what takes two
sections is checked by `Config` itself.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shoal.config.base import Device, Section, Strings

MAX_SEED = 2**63 - 1
"""Seeds travel as signed 64-bit integers."""


class Run(Section):
    """`[run]`: what this run is called and how long it is."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Folder of the run under `dir`: letters, digits, dots, dashes, underscores; absent: made from the configuration's
    name and the time."""
    dir: str = Field(default="runs", min_length=1)
    """Folder that holds the runs."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Everything random in the run follows from it."""
    steps: int = Field(default=40, ge=1)
    """Optimizer steps after which the run ends."""


class Model(Section):
    """`[model]`: what is trained."""

    name: str = Field(default="embedded", min_length=1)
    """`embedded` (SmolLM2-135M-Instruct), a Hugging Face hub name, a directory, or a .gguf file."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the weights that engines hold and the learner computes with."""
    context_tokens: int = Field(default=1024, ge=16, le=1 << 20)
    """Longest sequence, prompt and completion together."""


class Environment(Section):
    """`[envs.NAME]`: one environment to act in. NAME is free, and stands for it in metrics."""

    type: str = Field(min_length=1, max_length=256)
    """A built-in environment's name, or your own as `package.module:Class`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the tasks drawn from it, relative to the other environments' weights."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Handed to the environment, which checks it."""


class Rollout(Section):
    """`[rollout]`: how groups of episodes are sampled for training."""

    group_size: int = Field(default=8, ge=2, le=1024)
    """Rollouts of one task that are compared with each other."""
    groups_per_step: int = Field(default=8, ge=1, le=4096)
    """Groups consumed by one optimizer step."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest completion of one turn."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Sampling temperature; the learner applies the same one."""
    stop: Strings = Field(default=(), max_length=16)
    """Strings that end a completion."""
    lease_timeout_s: float = Field(default=60.0, gt=0)
    """A worker that shows no progress on a lease for this long loses it to another."""
    lookahead_groups: int | None = Field(default=None, ge=1)
    """How far the learner looks past the oldest fresh group for a finished one; absent: twice `groups_per_step`."""

    shuffle_rewards: bool = False
    """Permute each batch's rewards before training: the control run, which must not learn."""

    @property
    def window_groups(self) -> int:
        """`lookahead_groups` with its default filled in."""
        return self.lookahead_groups if self.lookahead_groups is not None else 2 * self.groups_per_step

    @model_validator(mode="after")
    def _window_holds_a_batch(self) -> Self:
        if self.window_groups < self.groups_per_step:
            raise ValueError(
                f"lookahead_groups = {self.lookahead_groups} is smaller than groups_per_step = "
                f"{self.groups_per_step}, so no batch would ever be complete"
            )
        return self


class Workers(Section):
    """`[workers]`: the rollout workers started on this machine. Others may join with the run's ticket."""

    count: int = Field(default=2, ge=0, le=1024)
    """Worker processes started with the run; 0 waits for workers to join."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each."""
    max_sequences: int = Field(default=64, ge=1, le=65536)
    """Sequences that one worker samples at once."""
    cache_tokens: int = Field(default=16384, ge=16)
    """Tokens that one worker's key-value cache holds, over all its sequences."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""


class Eval(Section):
    """`[eval]`: greedy answers to held-out questions."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training; 0: none between."""
    questions: int = Field(default=200, ge=1)
    """Distinct held-out questions, over all environments."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer of one turn."""
    before: bool = True
    """Evaluate the untouched model first."""
    after: bool = True
    """Evaluate the trained model at the end."""


class Network(Section):
    """`[network]`: where the run listens for workers."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 lets other machines join."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    tls: Literal["auto", "on", "off"] = "auto"
    """`auto` encrypts unless the address is loopback, `on` always; `off` is allowed on loopback only."""
    join_timeout_s: float = Field(default=30.0, gt=0)
    """How long a node that joins tries to reach the run."""
    ticket_hours: float = Field(default=168.0, gt=0, le=24 * 365)
    """How long nodes may join with the ticket that the run prints; those that have joined stay."""
    ticket_uses: int = Field(default=256, ge=1, le=4096)
    """How many nodes may join with it. `shoal ticket` makes others."""
    advertise: Strings = ()
    """Further addresses for the ticket, such as the public one of a machine behind NAT."""
    routers: Strings = Field(default=(), max_length=4)
    """Lines that `shoal router` printed, or files that hold them: the run is reached through these relays too. One
    text with commas between them will do."""

    @property
    def encrypted(self) -> bool:
        """`tls` with `auto` decided."""
        return self.tls == "on" or (self.tls == "auto" and not is_loopback(self.host))

    @field_validator("routers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _plain_only_on_loopback(self) -> Self:
        if self.tls == "off" and not is_loopback(self.host):
            raise ValueError(f'tls = "off" would send the run in the clear over {self.host}; use "auto" or "on"')
        return self


class Output(Section):
    """`[output]`: what a run leaves behind besides the model, the metrics and the report."""

    keep_episodes: bool = True
    """Write every consumed episode, readable, to `episodes/`."""
    plots: bool = True
    """Draw the report's plots."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics to a tracker as well; its package must be installed."""


def is_loopback(host: str) -> bool:
    """Whether nothing that is sent to `host` can leave this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
