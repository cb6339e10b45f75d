"""What nodes have shown that they can do: everybody's signed entries, merged into one view that all come to share.

    state of one signer  =  its entries 1 … n, a chain by hash     or  a fork that convicts it
    merge                =  the longer of two chains of which one begins the other; anything else is a fork

Invariants, tested by random walks:
- merging is commutative, associative and idempotent; whatever the order, loss or repetition of pages, two ledgers
  that exchange pages until both are complete hold the same entries (`root` is equal);
- an entry enters only with its signer's signature, behind the entry before it, and never about its signer itself;
- a signer with two different entries under one number is convicted for good: nothing it said counts any more, for
  anybody, and the fork is passed on;
- sizes are bounded: `MAX_SIGNERS` signers, `MAX_ENTRIES` entries each, and a signer that the run did not admit
  (`admits`) enters nothing.

A pure state machine: no clock, no socket. What the entries are worth is `planning.skills`' business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from blake3 import blake3

from shoal.errors import RecordError
from shoal.fabric.identity import Identity
from shoal.protocol.ledger import MAX_PAGE, Attestation, Contribution, Fork, LedgerEntry, LedgerHeads, LedgerPage
from shoal.protocol.roster import MARK_BYTES, SignedRecord
from shoal.swarm.signing import ForgedRecord, mark, sign, verified

MAX_SIGNERS = 4096
MAX_ENTRIES = 50_000
"""Of one signer; about 20 MB."""

NONE_BEFORE = bytes(MARK_BYTES)

Merged = Literal["new", "known", "early", "fork", "convicted", "forged", "foreign", "full"]
"""What became of an entry; `early`: an entry before it is missing; `foreign`: another run's, or of nobody admitted."""


class Ledger:
    """One node's copy.

    Args:
        admits: whether a key may say anything in this run.
    """

    def __init__(self, run: str, admits: Callable[[bytes], bool]) -> None:
        self.run = run
        self.revision = 0
        """Rises with every change."""
        self.counters: Counter[Merged] = Counter()
        self._admits = admits
        self._chains: dict[bytes, list[SignedRecord]] = {}
        self._entries: dict[bytes, list[LedgerEntry]] = {}
        self._forks: dict[bytes, Fork] = {}

    # What is said

    def write(
        self, identity: Identity, subject: bytes, what: Attestation | Contribution, issued_at: float
    ) -> SignedRecord:
        """Add an entry of one's own.

        Raises:
            RecordError: it is about oneself, out of range, or no entry of this key is taken (any more).
        """
        key = identity.public_key
        chain = self._chains.get(key, [])
        entry = LedgerEntry(
            run=self.run,
            sequence=len(chain) + 1,
            before=mark(chain[-1]) if chain else NONE_BEFORE,
            subject=subject,
            issued_at=issued_at,
            what=what,
        )
        signed = sign(identity, entry)
        if (verdict := self.merge(signed)) != "new":
            raise RecordError(f"this node's entry was not taken: {verdict}.")
        return signed

    def merge(self, signed: SignedRecord) -> Merged:
        """Take in an entry, whoever brought it."""
        verdict = self._merge(signed)
        self.counters[verdict] += 1
        self.revision += verdict in ("new", "fork")
        return verdict

    def _merge(self, signed: SignedRecord) -> Merged:
        key = signed.signer
        if key in self._forks:
            return "convicted"
        chain = self._chains.get(key, [])
        if chain and signed == chain[-1]:
            return "known"
        try:
            entry = verified(signed, LedgerEntry)
        except ForgedRecord:
            return "forged"
        except RecordError:
            return "foreign"
        if entry.run != self.run or entry.subject == key or not self._admits(key):
            return "foreign"
        if entry.sequence <= len(chain):
            there = chain[entry.sequence - 1]
            if there.body == signed.body:
                return "known"
            self._convict(Fork(there, signed))
            return "fork"
        if entry.sequence > len(chain) + 1:
            return "early"
        if entry.before != (mark(chain[-1]) if chain else NONE_BEFORE):
            # It continues another chain than the one here. Which entry forks is found when that one's come.
            return "early"
        if len(chain) >= MAX_ENTRIES or (not chain and len(self._chains) >= MAX_SIGNERS):
            return "full"
        self._chains.setdefault(key, []).append(signed)
        self._entries.setdefault(key, []).append(entry)
        return "new"

    def merge_fork(self, fork: Fork) -> Merged:
        """Take in the proof that a signer said two things at once."""
        key = fork.first.signer
        if key in self._forks:
            return "known"
        try:
            fork.check()
            first, second = verified(fork.first, LedgerEntry), verified(fork.second, LedgerEntry)
        except RecordError:
            return "forged"
        if first.run != self.run or second.run != self.run or first.sequence != second.sequence:
            return "forged"
        if not self._admits(key) or len(self._forks) >= MAX_SIGNERS:
            return "foreign"
        self._convict(fork)
        self.revision += 1
        return "fork"

    def _convict(self, fork: Fork) -> None:
        key = fork.first.signer
        self._forks[key] = fork
        self._chains.pop(key, None)
        self._entries.pop(key, None)

    # What is read

    def entries(self) -> Iterator[tuple[bytes, LedgerEntry]]:
        """All that counts, with its signer: signers by key, each one's entries in order."""
        for key in sorted(self._entries):
            for entry in self._entries[key]:
                yield key, entry

    def since(self, key: bytes, number: int) -> list[LedgerEntry]:
        """One signer's entries after `number`; a view that is kept up to date asks for these."""
        return self._entries.get(key, [])[number:]

    @property
    def signers(self) -> list[bytes]:
        return sorted(self._entries)

    @property
    def convicted(self) -> frozenset[bytes]:
        """Keys of those who said two things at once."""
        return frozenset(self._forks)

    @property
    def root(self) -> bytes:
        """Hash of the whole content: equal where two ledgers hold the same."""
        found = blake3()
        for key in sorted(self._chains):
            found.update(key + mark(self._chains[key][-1]))
        for key in sorted(self._forks):
            found.update(b"fork" + key)
        return found.digest(MARK_BYTES)

    # Comparing copies

    def heads(self) -> LedgerHeads:
        """How far this copy goes."""
        heads = {key: (len(chain), mark(chain[-1])) for key, chain in self._chains.items()}
        return LedgerHeads(heads=heads | dict.fromkeys(self._forks, (0, b"")))

    def page_for(self, theirs: LedgerHeads, *, most: int = MAX_PAGE) -> LedgerPage:
        """What somebody with these heads lacks, as much as fits into one page.

        Where a chain there does not begin the chain here, or the other way round, all of it is sent again from the
        place that both can have in common: the other then finds the fork.
        """
        forks = [self._forks[key] for key in sorted(self._forks) if theirs.heads.get(key) != (0, b"")]
        found: list[SignedRecord] = []
        more = len(forks) > most
        for key in sorted(self._chains):
            chain = self._chains[key]
            number, head = theirs.heads.get(key, (0, NONE_BEFORE))
            if theirs.heads.get(key) == (0, b""):
                continue
            agrees = number == 0 or (number <= len(chain) and mark(chain[number - 1]) == head)
            if not agrees:
                # Their chain is longer than this one (nothing to send, unless it is another chain) or has forked off.
                number = max(0, min(number, len(chain)) - 1)
            lacking = chain[number:]
            room = most - len(found)
            found += lacking[:room]
            more = more or len(lacking) > room
        return LedgerPage(entries=tuple(found), forks=tuple(forks[:most]), complete=not more)

    def take(self, page: LedgerPage) -> int:
        """Take in a page; returns how many entries and forks were new."""
        before = self.revision
        for fork in page.forks:
            self.merge_fork(fork)
        for signed in page.entries:
            self.merge(signed)
        return self.revision - before
