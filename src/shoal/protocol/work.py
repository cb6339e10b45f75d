"""What coordinator, workers and learner say to each other during a run.

A worker asks for work (`LeaseRequest`), gets a `Lease` (or a wait), reports progress (`Heartbeat`) and submits
episodes (`Submission`); the learner asks for the batch of a step (`BatchRequest`) and reports each finished step
(`StepReport`). Invariants: a lease names exactly the tasks and seeds to act on; a submission is idempotent by
episode id; the batch of a step never changes once it was handed out.
"""

from __future__ import annotations

from typing import Any, Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import SamplingParams, SwapPolicy

LeaseKind = Literal["train", "eval"]


class WorkSpec(Record, frozen=True):
    """What a worker needs to know about a run besides its leases."""

    model: str
    """`embedded`, a hub name, or a directory: where the worker gets architecture, tokenizer and version 0 from."""
    dtype: str
    envs: dict[str, dict[str, Any]]
    """Environment name -> its settings, as in the configuration."""
    context_tokens: int
    heartbeat_s: float
    on_swap: SwapPolicy = "keep"
    """What becomes of completions under way when the weights change."""
    seeded: bool = False
    """Whether tokens are checked to be those that the leases' seeds draw."""
    protocol: int = 1


class LeaseRequest(Record, frozen=True):
    """A worker with free slots asks for a group of rollouts."""

    node_id: str
    version: int
    """The newest policy version that the worker holds."""
    free_slots: int


class Lease(Record, frozen=True):
    """A group of rollouts to act on until the deadline."""

    id: str
    kind: LeaseKind
    group: str
    tasks: tuple[Task, ...]
    """One entry an episode; a GRPO group repeats one task, with sampling seeds of its own."""
    seeds: tuple[int, ...]
    params: SamplingParams
    min_version: int
    """No token may be sampled under an older version."""
    exact_version: bool
    """Where true, no token may be sampled under a newer version either (pull mode, evaluation)."""
    duration_s: float
    """From receipt; heartbeats that show progress extend it."""

    def check(self) -> None:
        self.params.check()
        for task in self.tasks:
            task.check()
        if not self.tasks or len(self.tasks) != len(self.seeds) or len(self.tasks) > 4096:
            raise RecordError("a lease has no tasks, too many, or not one seed for each.")


class LeaseReply(Record, frozen=True):
    """A lease, or what to do instead."""

    lease: Lease | None = None
    wait_s: float = 0.0
    """Without a lease: ask again after this long."""
    newest_version: int = 0
    ended: bool = False
    """The run is over; the worker leaves."""


MAX_ARRIVALS = 64
MAX_FEEDERS = 4096


class Fetching(Record, frozen=True):
    """A version that is on its way to a worker."""

    version: int
    bytes_done: int
    bytes_total: int

    def check(self) -> None:
        if not 0 <= self.bytes_done <= self.bytes_total:
            raise RecordError("a worker has fetched more of a version than there is.")


class Arrived(Record, frozen=True):
    """A version has come to a worker."""

    version: int
    seconds: float
    by_source: dict[str, int]
    """Bytes by the id of the node that sent them."""

    def check(self) -> None:
        smallest = min(self.by_source.values(), default=0)
        if not 0 <= self.seconds < 1e9 or len(self.by_source) > MAX_FEEDERS or smallest < 0:
            raise RecordError("a worker says impossible things of how a version came to it.")


class Heartbeat(Record, frozen=True):
    """A worker is alive and has made progress on its leases."""

    node_id: str
    version: int
    leases: dict[str, int]
    """Lease id -> tokens sampled so far under it."""
    tokens_per_s: float = 0.0
    fetching: Fetching | None = None
    arrived: tuple[Arrived, ...] = ()
    """Versions that came since the last heartbeat that was answered."""

    def check(self) -> None:
        if self.fetching is not None:
            self.fetching.check()
        if len(self.arrived) > MAX_ARRIVALS:
            raise RecordError("a worker tells of too many versions at once.")
        for arrived in self.arrived:
            arrived.check()


class HeartbeatReply(Record, frozen=True):
    """Leases that the coordinator no longer waits for; the worker drops them."""

    gone: tuple[str, ...] = ()
    newest_version: int = 0
    ended: bool = False


class Submission(Record, frozen=True):
    """Finished episodes of one lease, all of them at once: groups stay whole."""

    lease: str
    node_id: str
    episodes: tuple[Episode, ...]

    def check(self) -> None:
        if len(self.episodes) > 4096:
            raise RecordError("a submission holds too many episodes.")
        for episode in self.episodes:
            episode.check()


class SubmissionReply(Record, frozen=True):
    """What became of each episode: accepted, rejected, void, duplicate or late; or `checking`, where that will turn out
    later."""

    verdicts: dict[str, str]


class BatchRequest(Record, frozen=True):
    """The learner at `version` asks for the batch that makes version + 1."""

    version: int


class BatchReply(Record, frozen=True):
    """Whole groups of episodes, advantage still to be computed; or `None` while too few are fresh enough."""

    version: int
    episodes: tuple[Episode, ...] | None = None
    ended: bool = False
    save: bool = False
    """The run is to stop before its last step: save the present state, report it, and ask again."""


class StepReport(Record, frozen=True):
    """A learner step is done: its metrics, and the manifest if the version was published."""

    version: int
    metrics: dict[str, float]
    manifest: bytes | None = None
    """Bytes of a `SignedManifest`."""
    checkpointed: bool = False
    """This version can be restored; at the last step, the model is saved as well."""


class StepReply(Record, frozen=True):
    """Whether to go on."""

    ended: bool = False
    oldest_version: int | None = None
    """An older version than the newest ones that is still needed, by an evaluation: it may not be dropped."""
    publish_every: int = 0
    """Kappa, the steps between two publications from now on; 0: as configured."""


class Leaving(Record, frozen=True):
    """A node says goodbye; its leases are void at once."""

    node_id: str


class Ack(Record, frozen=True):
    """Received."""
