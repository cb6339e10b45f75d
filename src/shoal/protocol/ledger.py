"""What nodes have shown that they can do: entries that others sign, never the node itself.

    Attestation    "this key scored so much on that calibration task"    signed by who set and scored it
    Contribution   "this key did that work for me"                       signed by who asked for it

Each signer numbers its entries 1, 2, 3, … and every entry names the one before by hash, so a signer's entries are one
chain: two different entries with one number convict it. What travels is a `SignedRecord` (`protocol.roster`).

Invariants: nobody attests itself; an attestation names its task and the answer, so that whoever has the environment
can score it again; all sizes are bounded. This room only describes; `swarm.ledger` merges.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.episode import Task
from shoal.protocol.roster import KEY_BYTES, MARK_BYTES, MAX_SEQUENCE, SignedRecord

MAX_ENTRY_BYTES = 8 * 1024
MAX_SKILL_CHARS = 128
MAX_ANSWER_CHARS = 4096
MAX_PAGE = 256
"""Entries in one answer; who lacks more asks again."""

_PROBLEM = re.compile(r"[A-Za-z0-9._-]{1,64}")

Delivery = Literal["delivered", "failed", "late"]
"""Of work that an executor had acknowledged: it came, the executor gave up, or its lease ran out."""


class Attestation(msgspec.Struct, frozen=True, tag="attestation", forbid_unknown_fields=True):
    """One calibration task that the subject was set, and how it did."""

    skill: str
    """What the task asks for, in words: requirements are matched with it."""
    task: Task
    answer: str
    score: float
    """Of the answer, 0 to 1, by the task's own environment."""

    def check(self) -> None:
        if not self.skill.strip() or len(self.skill) > MAX_SKILL_CHARS:
            raise RecordError(f"an attestation's skill is empty or longer than {MAX_SKILL_CHARS} characters.")
        if len(self.answer) > MAX_ANSWER_CHARS:
            raise RecordError(f"an attested answer exceeds {MAX_ANSWER_CHARS} characters.")
        if not 0.0 <= self.score <= 1.0:
            raise RecordError(f"a score of {self.score} is not between 0 and 1.")
        self.task.check()


class Contribution(msgspec.Struct, frozen=True, tag="contribution", forbid_unknown_fields=True):
    """Work that the subject did for the signer."""

    problem: str
    """Id of the problem that it was part of."""
    step: int
    delivery: Delivery
    chain: str = ""
    """Id of the chain; a signer's second delivery of one step of one chain counts no more."""
    tokens: int = 0
    seconds: float = 0.0
    verified: float | None = None
    """What the result scored, where the signer could check it; None where nobody can."""

    def check(self) -> None:
        if not _PROBLEM.fullmatch(self.problem):
            raise RecordError(f"a problem's id {self.problem[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'.")
        if self.chain and not _PROBLEM.fullmatch(self.chain):
            raise RecordError(f"a chain's id {self.chain[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'.")
        if not (0 <= self.step < 1024 and 0 <= self.tokens < 2**40):
            raise RecordError("a contribution's step or tokens are out of range.")
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= 1e7):
            raise RecordError(f"a contribution took {self.seconds} seconds.")
        if self.verified is not None and not 0.0 <= self.verified <= 1.0:
            raise RecordError(f"a verified score of {self.verified} is not between 0 and 1.")


class LedgerEntry(Record, frozen=True):
    """One thing that its signer says about `subject`."""

    run: str
    sequence: int
    before: bytes
    """Hash of the signer's entry before this one; zeros for its first."""
    subject: bytes
    """Public key of the node that did it."""
    issued_at: float
    what: Attestation | Contribution

    def check(self) -> None:
        if not self.run or len(self.run) > 256:
            raise RecordError("an entry's run is empty or too long.")
        if not 1 <= self.sequence <= MAX_SEQUENCE:
            raise RecordError(f"an entry's number {self.sequence} is out of range.")
        if len(self.before) != MARK_BYTES or len(self.subject) != KEY_BYTES:
            raise RecordError("an entry's hash or subject has the wrong length.")
        if not (math.isfinite(self.issued_at) and 0 <= self.issued_at <= 1e12):
            raise RecordError(f"an entry's time {self.issued_at} is out of range.")
        self.what.check()


class Fork(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Two different entries of one signer with one number."""

    first: SignedRecord
    second: SignedRecord

    def check(self) -> None:
        self.first.check()
        self.second.check()
        if self.first.signer != self.second.signer or self.first.body == self.second.body:
            raise RecordError("a fork needs two different entries of one signer.")


class LedgerHeads(Record, frozen=True):
    """How far somebody's copy goes: signer -> number and hash of its last entry; 0 and nothing for a convicted one."""

    heads: dict[bytes, tuple[int, bytes]] = {}

    def check(self) -> None:
        if len(self.heads) > 8192:
            raise RecordError("a ledger lists more than 8192 signers.")
        for key, (number, mark) in self.heads.items():
            if len(key) != KEY_BYTES or not 0 <= number <= MAX_SEQUENCE or len(mark) not in (0, MARK_BYTES):
                raise RecordError("a ledger's head is malformed.")


class LedgerPage(Record, frozen=True):
    """Entries that the asker lacks, each signer's in order, and forks."""

    entries: tuple[SignedRecord, ...] = ()
    forks: tuple[Fork, ...] = ()
    complete: bool = True
    """False: there is more; ask again."""

    def check(self) -> None:
        if len(self.entries) > MAX_PAGE or len(self.forks) > MAX_PAGE:
            raise RecordError(f"a page holds more than {MAX_PAGE} entries.")
        for signed in self.entries:
            signed.check()
            if len(signed.body) > MAX_ENTRY_BYTES:
                raise RecordError(f"an entry of {len(signed.body)} bytes exceeds {MAX_ENTRY_BYTES} bytes.")
        for fork in self.forks:
            fork.check()
