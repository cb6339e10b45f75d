"""One ledger for all: nodes ask each other, in turn and at random, for the entries that they lack.

    every `every_s`: own heads ──▶ a random agent ──▶ the page of what is missing ──▶ … until it is complete

What this node itself has said is kept on disk where it has a lasting identity (`OwnEntries`): who forgot it and began
anew would contradict itself, and be convicted.

Invariants: both sides ask, so both end with the union; a page is bounded, and so is the number of pages of one round;
what a page brings is merged by `swarm.ledger`'s rules, whoever sent it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shoal.agents.collective.patience import Asking
from shoal.errors import NetworkError, RecordError, StorageError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode, read_jsonl, to_json
from shoal.protocol.ledger import LedgerHeads, LedgerPage
from shoal.protocol.roster import SignedRecord
from shoal.swarm.ledger import Ledger

log = logging.getLogger("shoal.collective")

MAX_HEADS_BYTES = 2**20
MAX_PAGE_BYTES = 4 * 2**20
ROUND_PAGES = 64
ASK_S = 5.0


def ledger_key(node: str) -> str:
    """Where a node gives pages of its ledger."""
    return f"collective/{node}/ledger"


class OwnEntries:
    """The entries that one identity wrote, on disk: a page of one entry a line.

    Raises:
        StorageError: the file cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            for _ in read_jsonl(path, LedgerPage):
                pass  # all of it can be read
            # Cut, and not written anew: a process that is killed meanwhile must forget nothing.
            with path.open("r+b") as file:
                file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))  # a killed writer's half line
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}.", "Give another --identity.") from None
        except RecordError as error:
            raise StorageError(
                f"what this node said before cannot be read: {error.problem}",
                f"Give another --identity; with this one and without {path} it would contradict itself.",
            ) from None

    def __iter__(self) -> Iterator[SignedRecord]:
        for page in read_jsonl(self._path, LedgerPage):
            yield from page.entries

    def keep(self, signed: SignedRecord) -> None:
        """Write an entry down, before anybody hears of it."""
        with self._path.open("ab") as file:
            file.write(to_json(LedgerPage(entries=(signed,))) + b"\n")


class Sharing:
    """One node's part.

    Args:
        peers: public keys of the other agents that are here.
    """

    def __init__(self, asking: Asking, ledger: Ledger, peers: Callable[[], Sequence[bytes]], every_s: float) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._ledger = ledger
        self._peers = peers
        self._every_s = every_s

    async def start(self, admits: Callable[[bytes], bool]) -> None:
        """Begin to give pages."""
        key = ledger_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._give, max_bytes=MAX_HEADS_BYTES, concurrency=4, allow=admits)

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1.5))
            if peers := self._peers():
                await self.ask(random.choice(peers))

    async def ask(self, key: bytes) -> int:
        """Take from one node what this one lacks; returns how much was new."""
        new = 0
        try:
            for _ in range(ROUND_PAGES):
                body = encode(self._ledger.heads())
                limit_s = self._asking.patience.limit_s(ASK_S)  # A page takes longer than other answers: not counted.
                answer = await self._fabric.request(
                    ledger_key(node_id_of(key)),
                    body,
                    limit_s,
                    to=key,
                    max_reply_bytes=MAX_PAGE_BYTES,
                    absent_grace_s=0.2,
                )
                page = decode(answer, LedgerPage, max_bytes=MAX_PAGE_BYTES)
                taken = self._ledger.take(page)
                new += taken
                if page.complete or not taken:
                    break
        except (NetworkError, RecordError) as error:
            log.info("no page of %s's ledger: %s", node_id_of(key), error)
        return new

    async def _give(self, request: Request) -> bytes:
        return encode(self._ledger.page_for(decode(request.body, LedgerHeads, max_bytes=MAX_HEADS_BYTES)))
