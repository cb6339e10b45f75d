"""What a memory is made of: entries, the contexts they come from, and the trials they are judged by.

Invariants: a content hash depends on values alone, never on machine, process, or the order in which a dict was
filled; equal entries made by two nodes have one id; every text and sequence is bounded, every number finite; a trial
is identified by what was run (task, seeds, model, configuration), so that the same run cannot count twice.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import msgspec
from blake3 import blake3

from shoal.errors import RecordError
from shoal.protocol.chat import Message
from shoal.protocol.codec import Record
from shoal.protocol.episode import MAX_TURNS, Task
from shoal.protocol.sampling import MAX_PROMPT_TOKENS, SamplingParams

HASH_CHARS = 40
"""160 bits of BLAKE3, in hexadecimal."""

MAX_ENTRY_CHARS = 8192
MAX_NAME_CHARS = 256
MAX_CONTEXT_CHARS = 1 << 22
"""All texts of one context together."""

MAX_TOOL_RESULTS = 1024
MAX_ANSWERS = 64
MAX_ANSWER_CHARS = 4096
MAX_DEPTH = 32
MAX_COST = 1 << 40
"""Steps or tokens of one run."""

Rule = Literal["worked_example", "correction", "insight", "manual", "abstract"]
"""How an entry came about; `insight` is written by a model, `manual` by a person."""


def content_hash(kind: str, value: object) -> str:
    """Hash of `value` (records, dicts, sequences, scalars) that is the same on every machine.

    MessagePack has one encoding for each integer, float and string, and keys are sorted; `kind` keeps values of two
    kinds that look alike apart.
    """
    data = msgspec.msgpack.encode(value, order="sorted")
    return blake3(kind.encode() + b"\0" + data).hexdigest()[:HASH_CHARS]


def settle_floats(record: Record, *names: str) -> None:
    """Make the named fields floats, and zero positive: 1 and 1.0 are one value and must have one hash."""
    for name in names:
        value = getattr(record, name)
        if type(value) in (int, float):
            msgspec.structs.force_setattr(record, name, float(value) + 0.0)


def check_hash(text: str, what: str) -> None:
    """Raise `RecordError` where `text` is not a content hash."""
    if len(text) != HASH_CHARS or not set(text) <= set("0123456789abcdef"):
        raise RecordError(f"{what} {text[:80]!r} is not {HASH_CHARS} hexadecimal digits.")


def check_name(text: str, what: str, *, optional: bool = True) -> None:
    """Raise `RecordError` where a name is too long, or empty although it must not be."""
    if len(text) > MAX_NAME_CHARS or (not text and not optional):
        raise RecordError(f"{what} {text[:40]!r} is empty or longer than {MAX_NAME_CHARS} characters.")


def check_finite(value: Any, what: str, depth: int = 0) -> None:
    """Raise `RecordError` where a JSON-like value holds a number that is not finite, or nests too deep."""
    if depth > MAX_DEPTH:
        raise RecordError(f"{what} is nested deeper than {MAX_DEPTH}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{what} holds a number that is not finite.")
    if isinstance(value, dict):
        for item in value.values():
            check_finite(item, what, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_finite(item, what, depth + 1)


class Scope(Record, frozen=True):
    """Whom an entry is for; an empty name means anybody."""

    user: str = ""
    agent: str = ""
    run: str = ""

    def check(self) -> None:
        for name in (self.user, self.agent, self.run):
            check_name(name, "the scope")

    def shows(self, entry: Scope) -> bool:
        """Whether an entry of scope `entry` may be shown to this reader."""
        pairs = ((entry.user, self.user), (entry.agent, self.agent), (entry.run, self.run))
        return all(not wanted or wanted == own for wanted, own in pairs)


class ToolResult(Record, frozen=True):
    """What a tool answered, so that a replay need not call it again."""

    tool: str
    arguments: dict[str, Any]
    result: str
    failed: bool = False

    @property
    def call(self) -> str:
        """Hash of the call: equal calls have equal hashes."""
        return tool_call_hash(self.tool, self.arguments)


def tool_call_hash(tool: str, arguments: dict[str, Any]) -> str:
    """What a stored result is found by."""
    return content_hash("call", (tool, arguments))


class World(Record, frozen=True):
    """An environment by its type and settings, so that every node makes the same one."""

    kind: str
    """A short name or import path (`envs.registry`)."""
    settings: dict[str, Any] = {}

    def check(self) -> None:
        check_name(self.kind, "an environment's type", optional=False)
        check_finite(self.settings, "an environment's settings")


class Context(Record, frozen=True, kw_only=True, dict=True):
    """One run, packed so that it can be replayed anywhere without asking anybody."""

    task: Task
    messages: tuple[Message, ...]
    """What the agent read first."""
    actions: tuple[str, ...]
    truncated: tuple[bool, ...]
    """For each action, whether the token limit cut it off."""
    tool_results: tuple[ToolResult, ...] = ()
    recalled: tuple[str, ...] = ()
    """Texts of the memories that the agent was shown; nothing is extracted from them again."""
    world: World | None = None
    """The environment, as any node can make it; None for runs that had none."""
    model: str
    """Hash or name of the weights."""
    config: str
    """Hash of the configuration that sampled."""
    sampling_seed: int | None = None
    params: SamplingParams | None = None
    """How it was sampled; None where nobody will sample it again."""
    context_tokens: int = 0
    """The longest sequence it was given; 0 with `params` absent."""
    outputs: str = ""
    """Hash of the tokens drawn: a greedy fp32 replay on one build draws the same."""
    reward: float
    scope: Scope = Scope()

    def __post_init__(self) -> None:
        settle_floats(self, "reward")

    def check(self) -> None:
        self.task.check()
        check_finite(self.task.data, "a context's task")
        self.scope.check()
        if len(self.actions) > MAX_TURNS or len(self.truncated) != len(self.actions):
            raise RecordError("a context has too many actions, or not one truncation flag for each.")
        if len(self.tool_results) > MAX_TOOL_RESULTS or len(self.recalled) > MAX_TOOL_RESULTS:
            raise RecordError(f"a context has more than {MAX_TOOL_RESULTS} tool results or recalled texts.")
        for result in self.tool_results:
            check_name(result.tool, "a tool", optional=False)
            check_finite(result.arguments, "a tool's arguments")
        texts = [m.content for m in self.messages] + [*self.actions, *self.recalled]
        if sum(map(len, texts)) + sum(len(r.result) for r in self.tool_results) > MAX_CONTEXT_CHARS:
            raise RecordError(f"a context holds more than {MAX_CONTEXT_CHARS} characters.")
        check_name(self.model, "a model")
        check_name(self.config, "a configuration")
        check_name(self.outputs, "the hash of what was drawn")
        if self.world is not None:
            self.world.check()
        if self.params is not None:
            self.params.check()
        if not math.isfinite(self.reward) or not 0 <= self.context_tokens <= MAX_PROMPT_TOKENS:
            raise RecordError("a context's reward is not finite, or its length is out of range.")

    @cached_property
    def id(self) -> str:
        """Hash of everything in it."""
        return content_hash("context", msgspec.to_builtins(self))


class Provenance(Record, frozen=True):
    """Where an entry comes from."""

    rule: Rule
    context: str = ""
    """Hash of the context; empty where a person wrote the entry."""
    origin: str = ""
    """The entry of which this is the abstract form."""
    node: str = ""

    def check(self) -> None:
        for text, what in ((self.context, "a context's hash"), (self.origin, "an entry's id")):
            if text:
                check_hash(text, what)
        check_name(self.node, "a node")


class Entry(Record, frozen=True, kw_only=True, dict=True):
    """One thing worth remembering, in words."""

    text: str
    """Normalised (`screening.normalise`)."""
    family: str
    """Environment whose tasks it is about."""
    scope: Scope = Scope()
    source_task: str = ""
    """Id of the task it was extracted from, which can be no evidence for it."""
    ttl_s: float = 0.0
    """Seconds until it expires; 0 keeps it."""
    provenance: Provenance

    def __post_init__(self) -> None:
        settle_floats(self, "ttl_s")

    def check(self) -> None:
        if not self.text or len(self.text) > MAX_ENTRY_CHARS:
            raise RecordError(f"an entry of {len(self.text)} characters is not of 1 to {MAX_ENTRY_CHARS}.")
        check_name(self.family, "a family", optional=False)
        if len(self.source_task) > 1024 or not (math.isfinite(self.ttl_s) and self.ttl_s >= 0):
            raise RecordError("an entry's source task is too long, or its time to live negative or not finite.")
        self.scope.check()
        self.provenance.check()

    @cached_property
    def id(self) -> str:
        """Hash of text, family and scope: the same words found twice are one entry, whoever found them."""
        return content_hash("entry", (self.text, self.family, self.scope))


class Run(Record, frozen=True):
    """One side of a trial."""

    reward: float
    steps: int
    """Model steps and tool calls (L)."""
    tokens: int
    """Tokens read and drawn (T)."""
    fingerprint: str = ""
    """Hash of the tokens drawn: greedy fp32 replays reproduce it bit by bit."""

    def __post_init__(self) -> None:
        settle_floats(self, "reward")

    def check(self) -> None:
        if not math.isfinite(self.reward) or not 0 <= self.steps <= MAX_COST or not 0 <= self.tokens <= MAX_COST:
            raise RecordError("a run's reward is not finite, or its steps or tokens are out of range.")
        check_name(self.fingerprint, "a fingerprint")


class Trial(Record, frozen=True, kw_only=True, dict=True):
    """One task run twice with the same fresh seed: without the memory (A) and with it (B)."""

    task: Task
    sampling_seed: int
    model: str
    config: str
    without: Run
    with_memory: Run
    answers: tuple[str, ...] = ()
    """Right answers of the task, where the environment knows them: an entry that holds one leaks."""

    def check(self) -> None:
        self.task.check()
        check_finite(self.task.data, "a trial's task")
        self.without.check()
        self.with_memory.check()
        check_name(self.model, "a model")
        check_name(self.config, "a configuration")
        if not 0 <= self.sampling_seed < 2**63:
            raise RecordError("a trial's seed is not between 0 and 2^63.")
        if len(self.answers) > MAX_ANSWERS or any(len(a) > MAX_ANSWER_CHARS for a in self.answers):
            raise RecordError("a trial has too many answers, or too long ones.")

    @cached_property
    def id(self) -> str:
        """Hash of what was run, not of how it ended: running it again adds no evidence."""
        return trial_id(self.task, self.sampling_seed, self.model, self.config)


def trial_id(task: Task, sampling_seed: int, model: str, config: str) -> str:
    """The id that a trial will have, before it is run."""
    return content_hash("trial", (task, sampling_seed, model, config))
