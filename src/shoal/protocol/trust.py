"""What coordinator and learner say to each other about episodes that are to be checked.

The learner asks for `Claim`s (`AuditRequest`, answered by `AuditReply`): episodes with what their lease said. It
computes what their tokens should have been and answers with one `Finding` each, in its next request. Invariants: a
claim is handed out again until its finding has come; findings are numbers and sentences, and the verdict is the
coordinator's.
"""

from __future__ import annotations

import math

from shoal.errors import RecordError
from shoal.protocol.chat import Message
from shoal.protocol.codec import Record
from shoal.protocol.episode import Episode

MAX_CLAIMS = 1024
"""Of one reply; a pass of the learner takes far fewer."""


class Claim(Record, frozen=True):
    """An episode whose first two tiers hold: what the environment and the lease say of it is right."""

    episode: Episode
    seed: int
    """That its lease gave this episode."""
    max_tokens: int
    """Of one turn."""
    stop: tuple[str, ...]
    opening: tuple[Message, ...]
    """What the environment opens with, by the coordinator's own copy of it."""
    unfinished: str | None = None
    """What the environment said last, where it had not said that the episode is over; else nothing."""

    def check(self) -> None:
        self.episode.check()


class Finding(Record, frozen=True):
    """What the learner found. All zeros where nothing could be computed."""

    episode: str
    """Its id."""
    problem: str = ""
    """What cannot be so, whatever the weights: text that the tokens don't say, another prompt, an end that is none."""
    gone: bool = False
    """A version that it names is not kept any more."""
    tokens: int = 0
    """Drawn ones, over all turns."""
    difference: float = 0.0
    """Mean |log μ − log π| of the claimed log-probabilities and those computed."""
    displacement: float = 0.0
    """Mean distance between the random number that the seed gives and the part of [0, 1) that draws the token."""
    surprise: float = 0.0
    """Σ (log π(token) + entropy): 0 in expectation for tokens drawn from π."""
    variance: float = 0.0
    """Σ Var[log π]: that of `surprise`."""
    seconds: float = 0.0
    """What checking it took, its share of the pass."""

    def check(self) -> None:
        numbers = (self.difference, self.displacement, self.surprise, self.variance, self.seconds)
        if not all(map(math.isfinite, numbers)) or self.tokens < 0 or len(self.episode) > 256:
            raise RecordError("a finding holds a number that is not finite, or no episode's id.")


class AuditRequest(Record, frozen=True):
    """The learner tells what it found and asks for more."""

    findings: tuple[Finding, ...] = ()

    def check(self) -> None:
        if len(self.findings) > MAX_CLAIMS:
            raise RecordError("an audit request holds too many findings.")
        for finding in self.findings:
            finding.check()


class AuditReply(Record, frozen=True):
    """What to check next, oldest first; nothing after a while where nothing is to be done."""

    claims: tuple[Claim, ...] = ()
    ended: bool = False

    def check(self) -> None:
        for claim in self.claims:
            claim.check()
