"""Tiers 3 and 4: whose episodes are checked against weights and seed, which wait for it, and what follows.

    submit() ─ tiers 1 and 2 hold ─▶ plan(): count it │ count it, and check it │ hold it until it is checked
                                        take() ─▶ claims ─▶ the learner ─▶ findings ─▶ found() ─▶ Verdict of a group
    standing (`planning/standing`) of each worker ◀── passed, failed

Whose work is looked at how often is `planning/standing`'s to say, what is too far off `planning/evidence`'s. Workers
that the run itself started run on its owner's machine and are not checked unless `[trust] own` says so. Nothing here
is written down: a coordinator that starts again has everybody on probation, and leases again what was held.

Invariants: what is held enters no batch and is not lost: its lease runs on until a verdict or `HOLD_S` ends it; no
more than `MAX_WAITING` episodes wait to be checked (a trusted worker's drawn beyond them are counted as skipped, and a
worker on probation gets no lease); a claim that was handed out is handed out again until its finding has come; a
failed group costs a worker one failure, however many of its episodes failed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shoal.config.sections import Trust as Settings
from shoal.coordinator.verification import Replay
from shoal.planning.evidence import Surprise, objection, tolerance_of
from shoal.planning.standing import Standing, State
from shoal.protocol.codec import encode
from shoal.protocol.episode import Episode
from shoal.protocol.trust import Claim, Finding
from shoal.protocol.work import Lease

MAX_WAITING = 512
"""Episodes that wait to be checked."""

MAX_HELD = 4
"""Groups of one worker on probation that wait at once: beyond them it gets no lease."""

HOLD_S = 900.0
"""What is held ends, as if its lease had expired, where the learner has not looked at it for this long."""

CLAIMS_AT_ONCE = 32

BYTES_AT_ONCE = 32 * 2**20
"""Claims handed out together have no more, whatever workers hand in: they must fit one message."""

Plan = Literal["count", "check", "hold"]


class Verdict(NamedTuple):
    """A group whose episodes are all checked."""

    lease_id: str
    node_id: str
    held: bool
    reasons: dict[str, str]
    """Episode id -> why it is rejected; empty where all is well."""
    gone: bool
    """A version that it names is not kept any more: nothing can be said."""
    excludes: bool
    """With this the worker is excluded."""


@dataclass
class _Group:
    """What is checked together."""

    node_id: str
    held: bool
    open: set[str]
    size: int
    reasons: dict[str, str] = field(default_factory=dict)
    gone: bool = False


@dataclass
class _Record:
    """One worker's."""

    standing: Standing
    surprise: Surprise = field(default_factory=Surprise)
    num_held: int = 0
    counted: int = 0
    """Episodes of it that may train the policy."""


def claims_of(lease: Lease, episodes: Sequence[Episode], replays: Sequence[Replay]) -> list[Claim]:
    """A group's episodes with what their lease and the environment say, for the learner to check."""
    return [
        Claim(
            episode=episode,
            seed=seed,
            max_tokens=lease.params.max_tokens,
            stop=lease.params.stop,
            opening=played.opening,
            unfinished=played.unfinished,
        )
        for episode, seed, played in zip(episodes, lease.seeds, replays, strict=True)
    ]


class Trust:
    """One run's.

    Args:
        dtype: number format of the workers' weights.
        draw: random numbers in [0, 1) that no worker can foresee.
    """

    def __init__(self, settings: Settings, dtype: str, draw: Callable[[], float] | None = None) -> None:
        self._settings = settings
        self._dtype = dtype
        self._draw = draw or random.SystemRandom().random
        self._records: dict[str, _Record] = {}
        self._groups: dict[str, _Group] = {}
        self._waiting: deque[Claim] = deque()
        self._lease_of: dict[str, str] = {}
        """Episode id -> its lease, for all that wait or are handed out."""
        self._out: dict[str, Claim] = {}
        self.counts: Counter[str] = Counter()
        """Episodes: checked, rejected, skipped, gone; and exclusions, check_tokens."""
        self.seconds = 0.0
        """What the learner has spent on checks."""
        self.is_own: Callable[[str], bool] = lambda _: True
        """Whether a node is one that the run itself started; those of a run without a service are."""
        self.device_of: Callable[[str], str] = lambda _: "cpu"

    # What the run asks

    def is_checked(self, node_id: str) -> bool:
        """Whether anything of this worker is ever checked by weights and seed."""
        return self._settings.check and (self._settings.own or not self.is_own(node_id))

    def state(self, node_id: str, now: float) -> State:
        """What the worker's record entitles it to."""
        return self._record(node_id).standing.state(now) if self.is_checked(node_id) else "trusted"

    def may_lease(self, node_id: str, now: float) -> bool:
        """Whether the worker may be given work."""
        state = self.state(node_id, now)
        if state == "trusted":
            return True
        has_room = self._record(node_id).num_held < MAX_HELD and len(self._lease_of) < MAX_WAITING
        return state == "probation" and has_room

    def why_not(self, node_id: str, now: float) -> str:
        """Why it may not, for people."""
        until = self._record(node_id).standing.excluded_until
        if until is not None and now < until:
            return f"what it handed in was not what it claimed; it may work again in {until - now:.0f} s"
        return "its first rollouts are being checked"

    def plan(self, node_id: str, size: int, now: float) -> Plan:
        """What becomes of a group of `size` episodes that this worker hands in now."""
        if not self.is_checked(node_id):
            return "count"
        standing = self._record(node_id).standing
        if standing.state(now) != "trusted":
            return "hold"
        if self._draw() >= standing.share(now):
            return "count"
        if len(self._lease_of) + size > MAX_WAITING:
            self.counts["skipped"] += size
            return "count"
        return "check"

    def claim(self, lease_id: str, node_id: str, claims: Sequence[Claim], *, held: bool) -> None:
        """Have a group checked."""
        self._groups[lease_id] = _Group(node_id, held, {c.episode.id for c in claims}, len(claims))
        self._record(node_id).num_held += held
        for claim in claims:
            self._lease_of[claim.episode.id] = lease_id
            self._waiting.append(claim)

    def counted(self, node_id: str, episodes: int) -> None:
        """So many episodes of a worker may train the policy from now on."""
        if self.is_checked(node_id):
            self._record(node_id).counted += episodes

    def misbehaved(self, node_id: str, now: float) -> bool:
        """One of the first two tiers rejected a group; whether that excludes the worker."""
        if not self.is_checked(node_id):
            return False
        return self._failed(node_id, now)

    def forget(self, lease_id: str) -> None:
        """A held group has ended otherwise."""
        group = self._groups.pop(lease_id, None)
        if group is None:
            return
        self._record(group.node_id).num_held -= group.held
        self._lease_of = {episode: lease for episode, lease in self._lease_of.items() if lease != lease_id}
        self._waiting = deque(claim for claim in self._waiting if claim.episode.id in self._lease_of)
        self._out = {episode: claim for episode, claim in self._out.items() if episode in self._lease_of}

    def held_of(self, node_id: str) -> list[str]:
        """Leases of this worker that are held."""
        return [lease_id for lease_id, group in self._groups.items() if group.held and group.node_id == node_id]

    # What the learner asks

    def take(self, most: int = CLAIMS_AT_ONCE) -> tuple[Claim, ...]:
        """The next claims to check; those that were handed out without coming back first."""
        while self._waiting and len(self._out) < most:
            claim = self._waiting.popleft()
            self._out[claim.episode.id] = claim
        found: list[Claim] = []
        num_bytes = 0
        for claim in self._out.values():
            num_bytes += len(encode(claim))
            if found and num_bytes > BYTES_AT_ONCE:
                break
            found.append(claim)
        return tuple(found)

    def found(self, findings: Sequence[Finding], now: float) -> list[Verdict]:
        """Take in what the learner found; gives the groups that are decided by it."""
        verdicts = []
        for finding in findings:
            lease_id = self._lease_of.pop(finding.episode, None)
            if lease_id is None or self._out.pop(finding.episode, None) is None:
                continue  # its group has ended meanwhile
            group = self._groups[lease_id]
            self._judge(group, finding)
            group.open.discard(finding.episode)
            if not group.open:
                verdicts.append(self._decide(lease_id, group, now))
        return verdicts

    def _judge(self, group: _Group, finding: Finding) -> None:
        record = self._record(group.node_id)
        self.counts["checked"] += 1
        self.counts["check_tokens"] += finding.tokens
        self.seconds += finding.seconds
        if finding.gone:
            group.gone = True
            self.counts["gone"] += 1
            return
        tolerance = tolerance_of(self.device_of(group.node_id), self._dtype).scaled(self._settings.tolerance)
        record.surprise.add(finding.surprise, finding.variance)
        reason = finding.problem
        reason = reason or objection(finding.tokens, finding.difference, finding.displacement, tolerance)
        if not reason and (reason := record.surprise.objection):
            record.surprise = Surprise()  # said once; it has to show again
        if reason:
            group.reasons[finding.episode] = reason
            self.counts["rejected"] += 1

    def _decide(self, lease_id: str, group: _Group, now: float) -> Verdict:
        del self._groups[lease_id]
        record = self._record(group.node_id)
        record.num_held -= group.held
        excludes = False
        if group.reasons:
            excludes = self._failed(group.node_id, now)
        elif not group.gone:
            record.standing.pass_(group.size, now)
        return Verdict(lease_id, group.node_id, group.held, group.reasons, group.gone, excludes)

    def _failed(self, node_id: str, now: float) -> bool:
        excludes = self._record(node_id).standing.fail(now)
        self.counts["exclusions"] += excludes
        return excludes

    # Views

    def facts(self) -> dict[str, float]:
        """For the run's metrics; nothing where nothing was ever checked."""
        if not self.counts:
            return {}
        return {f"trust/{name}": float(count) for name, count in sorted(self.counts.items())} | {
            "trust/seconds": self.seconds
        }

    def account(self, node_id: str) -> dict[str, float]:
        """One worker's record, for events."""
        record = self._record(node_id)
        return {
            "suspicion": record.standing.suspicion,
            "exclusions": record.standing.exclusions,
            "counted": record.counted,
            "z": record.surprise.z,
        }

    def _record(self, node_id: str) -> _Record:
        record = self._records.get(node_id)
        if record is None:
            record = self._records[node_id] = _Record(Standing(self._settings.probation, self._settings.sample))
        return record
