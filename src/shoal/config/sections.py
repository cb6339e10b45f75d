"""All sections but `[learner]`, in the order in which a configuration names them.

The values of a section are checked here where one section is enough to know that they are wrong; what takes two
sections is checked by `Config` itself.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shoal.config.base import Device, Section, Strings
from shoal.config.speculation import Speculation

MAX_SEED = 2**63 - 1
"""Seeds travel as signed 64-bit integers."""

Share = Annotated[float, Field(ge=0, le=1)]


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
    recall: bool = True
    """Whether its tasks are given notes where the run recalls any (`[memory] recall`); worlds that cannot say at once
    what a task asks, such as web pages, need false."""


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
    dynamic_sampling: bool = False
    """Leave groups whose rewards are all equal out of the batches, and draw others in their place."""
    resample_limit: float = Field(default=4.0, gt=0, le=1000)
    """Batches' worth of such groups in a row, after which one is taken after all."""
    pass_rate: Annotated[tuple[Share, Share], Field(strict=False)] = (0.0, 1.0)
    """Pass over tasks whose mean reward, as far as it was seen, lies outside of this range."""
    on_swap: Literal["keep", "recompute", "finish"] = "keep"
    """What becomes of completions under way when new weights are put in place: they go on with the cache that they
    have (`keep`), with a cache computed again under the new weights (`recompute`), or end first (`finish`)."""
    shuffle_rewards: bool = False
    """Permute each batch's rewards before training: the control run, which must not learn."""

    @property
    def window_groups(self) -> int:
        """`lookahead_groups` with its default filled in."""
        return self.lookahead_groups if self.lookahead_groups is not None else 2 * self.groups_per_step

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.pass_rate[0] >= self.pass_rate[1]:
            raise ValueError(f"pass_rate = {list(self.pass_rate)} is [lowest, highest], and holds nothing")
        return self

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
    prefix_tokens: int = Field(default=0, ge=0)
    """Tokens of ended turns kept beside the cache, so that the next turn of an episode computes only what
    is new. For environments of several turns; 0 keeps none."""
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


class Capacity(Section):
    """`[capacity]`: who works, and when, by what the run measures of itself."""

    pace: bool = True
    """Start groups just in time for the learner instead of as early as the staleness bound allows: fresher rollouts."""
    park: bool = True
    """Give no work to priced workers that the learner does not need; those without a price always work."""
    adapt_interval: bool = False
    """Choose the steps between two snapshots by what a snapshot takes to spread, not by `learner.publish_every`."""
    replan_steps: int = Field(default=20, ge=1)
    """Steps after which the plan is made anew, if neither members nor prices change before."""
    headroom: float = Field(default=0.05, ge=0, le=10)
    """How much more than the minimum works, so that one slow moment does not stop the learner."""
    acquire: Strings = ()
    """A command that gets another machine: a program and its arguments, no shell; run when workers are too few. Its
    environment has SHOAL_RUN, SHOAL_TICKET_FILE, SHOAL_RATE and SHOAL_NEEDED_RATE (rollouts a second)."""
    release: Strings = ()
    """A command that gives one back: run for a parked machine billed by the hour before its paid hour ends. Its
    environment has SHOAL_RUN, SHOAL_NODE and SHOAL_NODE_NAME."""
    on_activate: Strings = ()
    """A command run when a priced worker is given work: the first time, and when it was parked. Its environment has
    SHOAL_RUN, SHOAL_NODE and SHOAL_NODE_NAME."""
    on_park: Strings = ()
    """A command run when a priced worker is given no more work; a machine billed by use may be paused from here on."""
    hook_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """Any of these commands is killed after this."""
    acquire_every_s: float = Field(default=300.0, gt=0)
    """Between two calls of `acquire`: a machine takes time to come."""


class Budget(Section):
    """`[budget]`: what the run may cost. Workers say their own price (`shoal worker --price`)."""

    max_usd: float | None = Field(default=None, gt=0)
    """The run stops in order, its state saved, before it has cost more; absent: no bound."""
    max_usd_per_hour: float | None = Field(default=None, gt=0)
    """Workers that work cost no more an hour, all together; absent: no bound."""
    learner_usd_per_hour: float = Field(default=0.0, ge=0)
    """Price of the machine that this run is started on."""
    egress_usd_per_gb: float = Field(default=0.0, ge=0)
    """Price of what is sent to workers elsewhere."""


class Trust(Section):
    """`[trust]`: how often what workers hand in is checked against the policy's weights and the leased seed."""

    check: bool = True
    """Check workers that joined from outside; leases, limits and rewards are checked in any case."""
    own: bool = False
    """Check the workers that the run starts itself, too."""
    probation: int = Field(default=64, ge=0)
    """A new worker's episodes are all checked, and train nothing before, until so many have passed."""
    sample: float = Field(default=0.1, ge=0, le=1)
    """Share of a trusted worker's groups that is checked; they count at once."""
    seeds: bool = True
    """Check that tokens are those that the leased seeds draw. Workers that sample by vLLM need false; then one that
    hands in the best of many draws is not noticed."""
    learner_share: float = Field(default=0.1, ge=0, le=1)
    """The most that checks may add to the learner's steps, as a share of their time; what it idles costs nothing."""
    tolerance: float = Field(default=1.0, gt=0, le=100)
    """Widens what an honest worker may differ by, where its hardware rounds otherwise than any that was measured."""


class Serving(Section):
    """`[serving]`: the OpenAI-compatible server, `shoal serve`."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; beyond loopback only with API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the engine."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the weights."""
    weights: Literal["full", "int8"] = "full"
    """`int8`: keep the layers' weights in 8 bits, on a CPU: less memory, other answers (docs/serving.md)."""
    adapters: Strings = Field(default=(), max_length=64)
    """LoRA adapters, each as NAME=FOLDER; clients ask for MODEL:NAME. Not over stages."""
    embedding_model: str = ""
    """A second model, which answers /v1/embeddings; empty: none."""
    memory: str = ""
    """A folder of memories: what fits a conversation's last message is put before it (docs/memory.md); empty: none."""
    memory_tokens: int = Field(default=256, ge=16, le=1 << 16)
    """The longest block of such notes."""
    context_tokens: int = Field(default=8192, ge=16, le=1 << 20)
    """Longest sequence, prompt and completion together; the model's own limit holds as well."""
    max_sequences: int = Field(default=64, ge=1, le=65536)
    """Completions drawn at once; further ones wait."""
    max_waiting: int = Field(default=128, ge=0, le=65536)
    """Completions that may wait; beyond them requests are answered 429."""
    cache_tokens: int = Field(default=65536, ge=16)
    """Tokens that the key-value cache holds, over all sequences."""
    prefix_tokens: int = Field(default=16384, ge=0)
    """Tokens of finished sequences kept, beside the cache, for prompts that begin alike; 0 keeps none."""
    prefill_tokens: int = Field(default=512, ge=16)
    """Prompt tokens computed between two decode steps: less keeps streams even, more starts long prompts sooner."""
    max_body_bytes: int = Field(default=2**20, ge=1024, le=2**28)
    """Longest request body."""
    max_connections: int = Field(default=512, ge=1, le=65536)
    """Connections open at once; further ones are closed at once."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time that one request may take, its wait included."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long requests may still run once the server has been told to end."""
    capture: str = ""
    """Folder for the episodes of capture sessions; empty: no session can be opened."""
    capture_life_s: float = Field(default=3600.0, gt=0)
    """A session that has no reward by then is closed, and its episode void."""
    capture_sessions: int = Field(default=256, ge=1, le=65536)
    """Sessions open at once."""
    capture_tokens: int = Field(default=2**20, ge=16, le=2**24)
    """Tokens that one session records."""
    capture_redact: Strings = Field(default=(), max_length=64)
    """Regular expressions: a branch of an episode in which one of them is found is not kept."""
    stages: int = Field(default=0, ge=0, le=64)
    """Processes that share the model's layers; 0: this one has them all."""
    local_stages: int | None = Field(default=None, ge=0, le=64)
    """How many of them are started here; the others join with the ticket. Absent: all."""
    in_flight: int = Field(default=0, ge=0, le=64)
    """Batches under way at once over the stages, each with its share of `max_sequences` and `cache_tokens`; 0: as many
    as there are stages."""
    stage_host: str = Field(default="127.0.0.1", min_length=1)
    """Address on which stages join and link; beyond loopback all of it is TLS."""
    stage_patience_s: float = Field(default=30.0, gt=0)
    """How long requests wait when there are too few stages; then they are answered 503."""
    speculation: Speculation = Speculation()
    """Draft several tokens for one pass."""


class Memory(Section):
    """`[memory]`: notes from what this machine remembers, put before the run's tasks (docs/memory.md)."""

    recall: bool = False
    """Look up memories for each task as it is drawn; workers and checks find the notes in the task."""
    folder: str = ""
    """Where the memories are; empty: memory/ in this machine's data directory."""
    max_tokens: int = Field(default=256, ge=16, le=1 << 16)
    """The longest block of notes, by the model's own tokenizer."""
    entries: int = Field(default=4, ge=1, le=64)
    """Memories in a block, at most."""
    likeness: float = Field(default=0.0, ge=0, le=1)
    """Memories less similar to the question than this are left out; 0.4 keeps to what is about the same thing."""
    share: float = Field(default=0.75, gt=0, le=1)
    """Share of the tasks that are given notes; by the others it is measured what notes are worth."""


class Output(Section):
    """`[output]`: what a run leaves behind besides the model, the metrics and the report."""

    keep_episodes: bool = True
    """Write every consumed episode, readable, to `episodes/`."""
    plots: bool = True
    """Draw the report's plots."""
    snapshots_gb: float | None = Field(default=None, gt=0)
    """What published versions may take on the learner's disk; before they would take more, all but the newest are
    dropped. Absent: no limit but the versions kept."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Send the metrics to a tracker as well; its package must be installed."""


def is_loopback(host: str) -> bool:
    """Whether nothing that is sent to `host` can leave this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
