"""What nodes say of how they are: their state, their waits, their log lines, their stacks; and the coordinator's view.

    NodeStatus    one node about itself, on request            `node/ID/status`
    LogReply      its newest log lines, on from a cursor       `node/ID/logs`
    Dump          everything that helps when it hangs          `node/ID/dump`
    RunStatus     the coordinator about all of them            `run/status`

These are claims, for people: no decision of a run rests on them. Invariants: every text, number and list is bounded,
so that a hostile answer costs little and breaks no table; durations are seconds on the clock of whoever says so, so
that two machines' clocks need not agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record

MAX_WAITS = 64
"""Waits told of one node, the longest; `num_waits` says how many there are."""

MAX_ENTRIES = 128
"""Queues, rates, counters of one node."""

MAX_NODES = 2048
MAX_LEASES = 64
MAX_LINKS = 32
"""Delays told of one node."""

MAX_SENTENCES = 256
MAX_TEXT_CHARS = 512
MAX_LINES = 2000
"""Log lines kept by a node, and given in one answer."""

MAX_LINE_CHARS = 2000
MAX_SECTIONS = 16
MAX_SECTION_CHARS = 128 * 1024

MAX_STATUS_BYTES = 2 * 2**20
MAX_LOGS_BYTES = 16 * 2**20
MAX_DUMP_BYTES = 8 * 2**20
MAX_RUN_STATUS_BYTES = 32 * 2**20


class Wait(Record, frozen=True):
    """Somebody waits for something."""

    what: str
    whom: str = ""
    """Node id or name of the one waited for; empty where it is nobody in particular."""
    seconds: float = 0.0
    """How long already."""
    deadline_s: float = 0.0
    """How long at most, from its beginning; 0: as long as `until` says."""
    until: str = ""
    overdue: bool = False
    """It takes longer than such a wait does where all is well."""
    nested: bool = False
    """It is a detail of another wait."""

    def check(self) -> None:
        _check_texts(self.what, self.whom, self.until)
        _check_numbers(self.seconds, self.deadline_s)


class QueueState(Record, frozen=True):
    """How full a queue is."""

    name: str
    length: int
    bound: int
    """0: bounded by something else than a number of entries."""

    def check(self) -> None:
        _check_texts(self.name)
        _check_numbers(self.length, self.bound)


class NodeStatus(Record, frozen=True):
    """One node about itself."""

    node_id: str
    name: str
    role: str
    software: str
    protocol_version: int
    pid: int
    host: str
    now: float
    """Unix seconds on its clock."""
    up_s: float
    doing: str
    version: int = -1
    """Policy version that it holds; -1: none."""
    device: str = ""
    waits: tuple[Wait, ...] = ()
    """Longest first, nested ones left out."""
    num_waits: int = 0
    queues: tuple[QueueState, ...] = ()
    rates: dict[str, float] = {}
    """Per second."""
    counters: dict[str, int] = {}
    memory_bytes: int = 0

    def check(self) -> None:
        _check_texts(self.node_id, self.name, self.role, self.software, self.host, self.doing, self.device)
        _check_numbers(self.now, self.up_s, self.version, self.memory_bytes, self.num_waits, self.pid)
        _check_numbers(self.protocol_version)
        if len(self.waits) > MAX_WAITS:
            raise RecordError(f"a node's status tells more than {MAX_WAITS} waits.")
        if max(len(self.queues), len(self.rates), len(self.counters)) > MAX_ENTRIES:
            raise RecordError(f"a node's status has more than {MAX_ENTRIES} queues, rates or counters.")
        for part in (*self.waits, *self.queues):
            part.check()
        _check_table(self.rates)
        _check_table(self.counters)


class LogRequest(Record, frozen=True):
    """The newest lines, or those after a cursor."""

    after: int = -1
    """Number of the last line that the asker has; -1: the newest `limit` lines."""
    life: float = 0.0
    """`LogReply.life` that the cursor belongs to: a restarted node counts anew."""
    limit: int = 200

    def check(self) -> None:
        if not 1 <= self.limit <= MAX_LINES:
            raise RecordError(f"between 1 and {MAX_LINES} log lines can be asked for.")


class LogLine(Record, frozen=True):
    """One line of a log, or several that belong together."""

    number: int
    time: float
    """Unix seconds on the node's clock."""
    level: str
    text: str

    def check(self) -> None:
        _check_numbers(self.number, self.time)
        if len(self.level) > 16 or len(self.text) > MAX_LINE_CHARS:
            raise RecordError("a log line is too long.")


class LogReply(Record, frozen=True):
    """Lines in order."""

    lines: tuple[LogLine, ...]
    life: float
    """When the node's process began to keep lines: another life, another count."""
    missed: int = 0
    """Lines after the cursor that were no longer kept."""

    def check(self) -> None:
        _check_numbers(self.life, self.missed)
        if len(self.lines) > MAX_LINES:
            raise RecordError(f"an answer has more than {MAX_LINES} log lines.")
        for line in self.lines:
            line.check()


class Dump(Record, frozen=True):
    """What a process does at this moment, in sections of text: stacks, waits, queues, memory, files."""

    node_id: str
    name: str
    role: str
    taken_at: float
    sections: dict[str, str]

    def check(self) -> None:
        _check_texts(self.node_id, self.name, self.role)
        _check_numbers(self.taken_at)
        if len(self.sections) > MAX_SECTIONS:
            raise RecordError(f"a dump has more than {MAX_SECTIONS} sections.")
        for title, text in self.sections.items():
            _check_texts(title)
            if len(text) > MAX_SECTION_CHARS:
                raise RecordError(f"a dump has a section of more than {MAX_SECTION_CHARS} characters.")


class LeaseState(Record, frozen=True):
    """A lease that a node holds."""

    id: str
    rollouts: int
    tokens: int
    """Its progress so far."""
    left_s: float
    """Until it expires, without further progress."""

    def check(self) -> None:
        _check_texts(self.id)
        _check_numbers(self.rollouts, self.tokens, self.left_s)


NodeState = Literal["active", "idle", "parked", "silent", "lost", "starting"]
"""`active`: it has work; `idle`: it could have some and there is none; `parked`: it is kept from work, `why` says why;
`silent`: not heard of for longer than a healthy node ever is; `lost`: its connection went; `starting`: it was started
here and has not joined yet."""


class NodeView(Record, frozen=True):
    """One node as the coordinator sees it."""

    node_id: str
    name: str
    role: str
    state: NodeState
    why: str = ""
    public_key: bytes = b""
    device: str = ""
    silent_s: float = 0.0
    """Since it was last heard of."""
    version: int = -1
    tokens_per_s: float = 0.0
    price_usd_per_hour: float = 0.0
    leases: tuple[LeaseState, ...] = ()
    num_leases: int = 0
    """`leases` holds the first of them."""
    delays: dict[str, float] = {}
    """Node id -> round-trip seconds, as it measured them."""
    status: NodeStatus | None = None
    """What it said last."""
    status_age_s: float = 0.0

    def check(self) -> None:
        _check_texts(self.node_id, self.name, self.role, self.why, self.device)
        _check_table(self.delays)
        _check_numbers(self.silent_s, self.version, self.tokens_per_s, self.price_usd_per_hour, self.num_leases)
        _check_numbers(self.status_age_s)
        if len(self.public_key) not in (0, 32) or len(self.leases) > MAX_LEASES:
            raise RecordError("a node's view has a wrong key or too many leases.")
        if len(self.delays) > MAX_LINKS:
            raise RecordError(f"a node's view tells more than {MAX_LINKS} delays.")
        for lease in self.leases:
            lease.check()
        if self.status is not None:
            self.status.check()


class RunStatus(Record, frozen=True):
    """A run as its coordinator sees it."""

    run: str
    step: int
    steps: int
    published: int
    """The newest version that workers can have; -1: none yet."""
    max_staleness: int
    """The bound that the run keeps."""
    most_stale: int
    """The stalest rollout that was trained on."""
    groups: dict[str, int]
    """Of rollouts, by what became of them."""
    usd_per_hour: float
    coordinator: NodeStatus
    nodes: tuple[NodeView, ...]
    silent: tuple[str, ...]
    """One sentence for whatever keeps others waiting."""
    ended: bool = False
    failure: str = ""
    mode: str = ""
    metrics: dict[str, float] = {}
    """Of the last step."""

    def check(self) -> None:
        _check_texts(self.run, self.failure, self.mode)
        _check_numbers(self.step, self.steps, self.published, self.max_staleness, self.most_stale, self.usd_per_hour)
        if len(self.nodes) > MAX_NODES or len(self.silent) > MAX_SENTENCES:
            raise RecordError("a run's status names too many nodes.")
        _check_texts(*self.silent)
        _check_table(self.groups)
        if len(self.metrics) > 4 * MAX_ENTRIES:
            raise RecordError("a run's status has too many metrics.")
        for name in self.metrics:
            _check_texts(name)
        self.coordinator.check()
        for node in self.nodes:
            node.check()


def clipped(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """`text`, cut where it is longer than a record may hold."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _check_texts(*texts: str) -> None:
    if any(len(text) > MAX_TEXT_CHARS for text in texts):
        raise RecordError(f"a status has a text of more than {MAX_TEXT_CHARS} characters.")


def _check_numbers(*numbers: float) -> None:
    if not all(math.isfinite(number) and -1 <= number < 2**63 for number in numbers):
        raise RecordError("a status has a number that is negative, too large or not finite.")


def _check_table(table: Mapping[str, float] | Iterable[str]) -> None:
    if isinstance(table, Mapping):
        _check_texts(*table)
        _check_numbers(*table.values())
