"""What nodes say to each other when they solve a problem together and nobody is in charge.

    poser ──Commission──▶ planner               write a chain for this problem, and see it through
    anybody ──Beacon──▶ all agents ──Offer──▶   who could do a step with this requirement?
    giver ──Take──▶ executor                    the step is yours if you acknowledge it
    executor ──Brief──▶ planner ──Briefing──▶   what is to be done: this step's words, what it needs, what comes next
    executor ──Report──▶ planner                done (signed), and who took the next step; or still at work
    planner ──ChainResult──▶ poser              the answer, and the signed reports that it rests on
    poser ──Judged──▶ planner ──Verdict──▶ executors    what the chain turned out to be worth: to learn from

Privacy: a beacon carries a requirement and nothing of the problem; what a step is about is told by its planner to
whoever took it, sealed; an executor never reads the problem, other steps' words, or results that it does not need.

Invariants: all texts and numbers are bounded; a step's number only rises along a chain, so there is no loop. This room
only describes; `agents.collective` acts.
"""

from __future__ import annotations

import math
import re

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.ledger import MAX_SKILL_CHARS
from shoal.protocol.roster import KEY_BYTES, SignedRecord

MAX_STEPS = 16
MAX_PROBLEM_CHARS = 32_000
MAX_REQUIREMENT_CHARS = 512
MAX_TASK_CHARS = 16_000
MAX_RESULT_CHARS = 16_000
MAX_CLAIMS = 64
MAX_LEASE_S = 3600.0
MAX_SHOWN_CHARS = 1000
"""Of a step's words and result, in what a planner tells its poser for people to read."""
DIGEST_BYTES = 32

_ID = re.compile(r"[0-9a-f]{16}")


def _check_ids(*ids: str) -> None:
    for one in ids:
        if not _ID.fullmatch(one):
            raise RecordError(f"{one[:40]!r} is not 16 hexadecimal digits.")


def _check_text(name: str, text: str, most: int, *, empty: bool = False) -> None:
    if len(text) > most or not (empty or text.strip()):
        raise RecordError(f"{name} of {len(text)} characters is empty or exceeds {most}.")


def _check_seconds(name: str, seconds: float, most: float = MAX_LEASE_S) -> None:
    if not (math.isfinite(seconds) and 0 <= seconds <= most):
        raise RecordError(f"{name} = {seconds} is not between 0 and {most:g} seconds.")


def _check_score(score: float) -> None:
    if not 0 <= score <= 1:
        raise RecordError(f"a score of {score} is not between 0 and 1.")


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which step of which chain of which problem."""

    problem: str
    chain: str
    step: int

    def check(self) -> None:
        _check_ids(self.problem, self.chain)
        if not 0 <= self.step < MAX_STEPS:
            raise RecordError(f"step {self.step} is not between 0 and {MAX_STEPS}.")


class Beacon(Record, frozen=True):
    """Who could do this?"""

    id: str
    requirement: str
    listens_s: float
    """How long offers are listened to."""
    lease_s: float
    """How long the work may take."""

    def check(self) -> None:
        _check_ids(self.id)
        _check_text("a requirement", self.requirement, MAX_REQUIREMENT_CHARS)
        _check_seconds("listens_s", self.listens_s, 60.0)
        _check_seconds("lease_s", self.lease_s)


class Offer(Record, frozen=True):
    """I could. Its sender is the node that could."""

    beacon: str
    availability: float
    """The share of its time that it has, 0 to 1."""
    price_usd: float = 0.0
    claims: dict[str, float] = {}
    """Skill -> how good it says it is; worth one trial each."""

    def check(self) -> None:
        _check_ids(self.beacon)
        if not (0 <= self.availability <= 1 and 0 <= self.price_usd < 1e6):
            raise RecordError("an offer's availability or price is out of range.")
        if len(self.claims) > MAX_CLAIMS or any(len(skill) > MAX_SKILL_CHARS for skill in self.claims):
            raise RecordError(f"an offer claims more than {MAX_CLAIMS} skills, or one with a long name.")
        if any(not 0 <= claim <= 1 for claim in self.claims.values()):
            raise RecordError("an offer claims something that is not between 0 and 1.")


class Take(Record, frozen=True):
    """The step is yours. The answer to this request is the acknowledgement."""

    place: Place
    planner: bytes
    """Public key of the node that tells what is to be done, and waits for it."""
    lease_s: float

    def check(self) -> None:
        self.place.check()
        if len(self.planner) != KEY_BYTES:
            raise RecordError("a hand-over's planner is no key.")
        _check_seconds("lease_s", self.lease_s)


class Taken(Record, frozen=True):
    """Whether the step was taken."""

    accepted: bool
    reason: str = ""

    def check(self) -> None:
        _check_text("a reason", self.reason, 512, empty=True)


class Brief(Record, frozen=True):
    """What is to be done in the step that I took?"""

    place: Place

    def check(self) -> None:
        self.place.check()


class Briefing(Record, frozen=True):
    """A step as its executor sees it."""

    requirement: str
    task: str
    needed: dict[int, str] = {}
    """Step -> the result that this one depends on."""
    next_requirement: str = ""
    """Empty for the last step."""
    lease_s: float = 60.0

    def check(self) -> None:
        _check_text("a requirement", self.requirement, MAX_REQUIREMENT_CHARS)
        _check_text("a sub-task", self.task, MAX_TASK_CHARS)
        _check_text("a requirement", self.next_requirement, MAX_REQUIREMENT_CHARS, empty=True)
        _check_seconds("lease_s", self.lease_s)
        for step, result in self.needed.items():
            if not 0 <= step < MAX_STEPS:
                raise RecordError("a briefing needs a step that cannot be.")
            _check_text("a result", result, MAX_RESULT_CHARS, empty=True)


class StepDone(Record, frozen=True):
    """What an executor signs: that it did this step, with this result."""

    run: str
    place: Place
    requirement: str
    result_hash: bytes
    """BLAKE3 of the result's UTF-8."""
    tokens: int = 0
    seconds: float = 0.0

    def check(self) -> None:
        self.place.check()
        if not self.run or len(self.run) > 256 or len(self.result_hash) != DIGEST_BYTES:
            raise RecordError("a signed step's run or hash is malformed.")
        _check_text("a requirement", self.requirement, MAX_REQUIREMENT_CHARS)
        if not 0 <= self.tokens < 2**40:
            raise RecordError("a signed step's tokens are out of range.")
        _check_seconds("seconds", self.seconds, 1e7)


class Report(Record, frozen=True):
    """From an executor to its planner: still at work, done, or unable."""

    place: Place
    result: str = ""
    done: SignedRecord | None = None
    """A `StepDone` about `result`; None while at work."""
    next: bytes = b""
    """Who took the next step; empty where nobody did, or there is none."""
    failure: str = ""
    """Why it cannot be done."""

    def check(self) -> None:
        self.place.check()
        _check_text("a result", self.result, MAX_RESULT_CHARS, empty=True)
        _check_text("a failure", self.failure, 512, empty=True)
        if len(self.next) not in (0, KEY_BYTES):
            raise RecordError("a report's next executor is no key.")
        if self.done is not None:
            self.done.check()


class Underway(Record, frozen=True):
    """From a poser to a planner: how is this chain?"""

    chain: str

    def check(self) -> None:
        _check_ids(self.chain)


class StepView(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step of a chain, for its poser to read."""

    requirement: str
    task: str
    executor: bytes = b""
    """Who has it now, or did it; empty where nobody has it yet."""
    result: str = ""

    def check(self) -> None:
        _check_text("a requirement", self.requirement, MAX_REQUIREMENT_CHARS)
        _check_text("a sub-task", self.task, MAX_SHOWN_CHARS, empty=True)
        _check_text("a result", self.result, MAX_SHOWN_CHARS, empty=True)
        if len(self.executor) not in (0, KEY_BYTES):
            raise RecordError("a step's executor is no key.")


class Progress(Record, frozen=True):
    """The planner's answer: how far its chain is."""

    here: bool
    """Whether it is still at it."""
    steps: tuple[StepView, ...] = ()
    """Empty while the chain is being written."""

    def check(self) -> None:
        if len(self.steps) > MAX_STEPS:
            raise RecordError(f"a chain has more than {MAX_STEPS} steps.")
        for step in self.steps:
            step.check()


class Reported(Record, frozen=True):
    """The planner's answer."""

    goes_on: bool
    """False: the step is somebody else's by now, or the chain has ended; stop."""


class Commission(Record, frozen=True):
    """Write a chain for this problem, and see it through until the deadline."""

    problem: str
    chain: str
    text: str
    deadline_s: float

    def check(self) -> None:
        _check_ids(self.problem, self.chain)
        _check_text("a problem", self.text, MAX_PROBLEM_CHARS)
        _check_seconds("deadline_s", self.deadline_s)


class ChainResult(Record, frozen=True):
    """How a chain ended."""

    problem: str
    chain: str
    answer: str | None
    """None: it could not be finished, and abstains."""
    done: tuple[SignedRecord, ...] = ()
    """The executors' `StepDone`, step by step; the last one's hash is the answer's."""
    steps: tuple[StepView, ...] = ()
    """What was asked and said, for people; nothing is decided by it."""
    tokens: int = 0
    """That writing the chain took."""
    reason: str = ""
    """Why there is no answer."""

    def check(self) -> None:
        _check_ids(self.problem, self.chain)
        _check_text("an answer", self.answer or "", MAX_RESULT_CHARS, empty=True)
        _check_text("a reason", self.reason, 512, empty=True)
        if max(len(self.done), len(self.steps)) > MAX_STEPS or not 0 <= self.tokens < 2**40:
            raise RecordError(f"a chain has more than {MAX_STEPS} steps, or took an impossible number of tokens.")
        for signed in self.done:
            signed.check()
        for step in self.steps:
            step.check()


class Judged(Record, frozen=True):
    """From a poser to a planner: what its chain's answer turned out to be worth."""

    chain: str
    score: float

    def check(self) -> None:
        _check_ids(self.chain)
        _check_score(self.score)


class Verdict(Record, frozen=True):
    """From a planner to whoever did a step: what came of the chain that it was part of."""

    place: Place
    score: float

    def check(self) -> None:
        self.place.check()
        _check_score(self.score)
