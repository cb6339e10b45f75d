"""`[learner]`: how weights are made from episodes.

The table comes in three kinds, told apart by `mode`, so that a wrong combination cannot be written: only `async`
takes a staleness bound and a publication interval; in `pull` and `colocated` every rollout is sampled under the very
weights that it then trains, and `max_staleness` reads 0.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from shoal.config.base import Device, Section, Strings, default_kind

Normalisation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
"""TRL's names. `grpo`: mean over each sequence's tokens, then over sequences; `dapo`: over all tokens of the step;
`bnpo`: the same here, where a step is one batch however it is packed; `dr_grpo`: sum over a constant length."""


LrSchedule = Literal["constant", "linear", "cosine"]

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Advantage(Section):
    """How a group's rewards become advantages."""

    type: str = Field(default="grpo", min_length=1, max_length=256)
    """`grpo`, or a function of your own as `package.module:function`."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation; false is Dr. GRPO."""
    delta: float = Field(default=1e-4, ge=0)
    """Added to the standard deviation, so that a nearly unanimous group does not explode."""


class BehaviourImportance(Section):
    """The ratio is taken to the policy that sampled the tokens, and clipped: rho = pi / mu."""

    type: Literal["behaviour"] = "behaviour"
    """`behaviour` or `proximal`."""


class ProximalImportance(Section):
    """The ratio is taken to the policy at the start of the step and clipped; that policy's ratio to mu, capped, is a
    weight."""

    type: Literal["proximal"] = "proximal"
    """`behaviour` or `proximal`."""
    cap: float = Field(default=2.0, gt=0)
    """C of truncated importance sampling: the weight is min(pi_prox / mu, C)."""


Importance = Annotated[
    BehaviourImportance | ProximalImportance,
    Field(discriminator="type"),
    BeforeValidator(default_kind("type", "behaviour")),
]


class _ClippedLoss(Section):
    """What GRPO's and GSPO's losses share."""

    delta: float | None = Field(default=None, gt=1)
    """Upper bound on the ratio where the advantage is negative (two-sided clip); absent: no such bound."""
    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(pi || reference); 0 keeps no reference model."""
    importance: Importance = BehaviourImportance()
    """Which policy the ratio is taken to."""


class GrpoLoss(_ClippedLoss):
    """The ratio of each token is clipped."""

    type: Literal["grpo"] = "grpo"
    """`grpo`, `gspo` or `custom`."""
    eps_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio is clipped below at 1 - eps_low."""
    eps_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + eps_high."""
    normalisation: Normalisation = "dapo"
    """What the sum over tokens is divided by, by TRL's names."""


class GspoLoss(_ClippedLoss):
    """The ratio of each whole sequence, the geometric mean of its tokens' ratios, is clipped."""

    type: Literal["gspo"] = "gspo"
    """`grpo`, `gspo` or `custom`."""
    eps_low: float = Field(default=3e-4, gt=0, le=1)
    """The sequence's ratio is clipped below at 1 - eps_low."""
    eps_high: float = Field(default=4e-4, gt=0)
    """The sequence's ratio is clipped above at 1 + eps_high."""
    normalisation: Normalisation = "grpo"
    """What the sum over tokens is divided by; `grpo` weighs every sequence alike, as in the paper."""


class CustomLoss(_ClippedLoss):
    """A function of your own gives each token's loss."""

    type: Literal["custom"] = "custom"
    """`grpo`, `gspo` or `custom`."""
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`package.module:function`; docs/capture.md says what it takes and gives."""
    options: dict[str, float] = Field(default_factory=dict)
    """Handed to the function."""
    normalisation: Normalisation = "dapo"
    """What the sum over tokens is divided by, by TRL's names."""


Loss = Annotated[
    GrpoLoss | GspoLoss | CustomLoss,
    Field(discriminator="type"),
    BeforeValidator(default_kind("type", "grpo")),
]


class Lora(Section):
    """Train low-rank adapters and leave the weights themselves as they are."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped in training; rollouts never drop any."""
    targets: Strings = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    publish: Literal["adapters", "merged"] = "adapters"
    """What workers fetch: the adapters, which they merge into their own base model, or the merged weights."""


class _LearnerSection(Section):
    """What all modes share."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps AdamW's two moments in 8 bits: a quarter of their memory, steps a little coarser."""
    lr: float = Field(default=1e-5, ge=0, le=1)
    """Peak learning rate of AdamW."""
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, each at least 0 and below 1."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global norm of a step's gradient; larger ones are scaled down to it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to `lr`."""
    lr_schedule: LrSchedule = "constant"
    """The learning rate after the warm-up: `constant`, or falling by a straight line or a half cosine towards 0 at the
    run's last step."""
    advantage: Advantage = Advantage()
    """How a group's rewards become advantages."""
    skip_zero_advantage: bool = True
    """Leave groups whose rewards are all equal out of the step: they have no policy gradient. False computes them, for
    the KL penalty of their tokens."""
    loss: Loss = GrpoLoss()
    """The policy-gradient loss."""
    lora: Lora | None = None
    """Low-rank adapters; absent: all weights are trained."""
    microbatch_tokens: int = Field(default=1024, ge=16)
    """Tokens of one forward and backward pass; lower it where memory is short, the result stays the same."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the learner's process."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    processes: int = Field(default=1, ge=1, le=1024)
    """Processes that share the learner's work, weights and optimizer, one a GPU (FSDP2 under torchrun)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    checkpoint_every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 writes only the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if self.processes > 1 and self.optimizer != "adamw":
            raise ValueError(
                f"optimizer = '{self.optimizer}' keeps blocks of values that cannot be divided among processes = "
                f"{self.processes}; set optimizer = 'adamw', or processes = 1"
            )
        if self.processes > 1 and self.device.startswith("cuda:"):
            raise ValueError(
                f"device = '{self.device}' is one GPU, and processes = {self.processes} take one each; "
                "set device = 'cuda'"
            )
        return self


class AsyncLearner(_LearnerSection):
    """Workers sample all the time; the learner trains on whatever is fresh enough."""

    mode: Literal["async"] = "async"
    """`async`, `pull` or `colocated`."""
    max_staleness: int = Field(default=2, ge=1)
    """S: no rollout trains a policy more than S versions newer than the one that sampled its oldest token."""
    publish_every: int = Field(default=1, ge=1)
    """Kappa: optimizer steps between two published snapshots; at most `max_staleness`."""

    @model_validator(mode="after")
    def _something_fresh_exists(self) -> Self:
        if self.publish_every > self.max_staleness:
            raise ValueError(
                f"publish_every = {self.publish_every} exceeds max_staleness = {self.max_staleness}, so rollouts "
                "could go stale before newer weights exist to replace them"
            )
        return self


class _OnPolicyLearner(_LearnerSection):
    """Every rollout is sampled under the weights that it trains."""

    @property
    def max_staleness(self) -> int:
        """S = 0: strictly on-policy."""
        return 0

    @property
    def publish_every(self) -> int:
        """Each step's weights are needed before the next rollouts can start."""
        return 1


class PullLearner(_OnPolicyLearner):
    """The learner asks for rollouts of its own version and waits for them."""

    mode: Literal["pull"] = "pull"
    """`async`, `pull` or `colocated`."""


class ColocatedLearner(_OnPolicyLearner):
    """One process samples, then trains, in turn: the baseline for the other two."""

    mode: Literal["colocated"] = "colocated"
    """`async`, `pull` or `colocated`."""

    @model_validator(mode="after")
    def _is_one_process(self) -> Self:
        if self.processes > 1:
            raise ValueError(f"mode = 'colocated' is one process, and processes = {self.processes} are asked for")
        return self


Learner = Annotated[
    AsyncLearner | PullLearner | ColocatedLearner,
    Field(discriminator="mode"),
    BeforeValidator(default_kind("mode", "async")),
]
