"""The run's decisions: who acts on what, what is accepted, which batch comes next, when the run is over.

    lease()  ──▶ evaluation first, then a group that admission lets start
    submit() ──▶ verified ──▶ whole groups to the queue, answers to the evaluation; some are held until they are checked
    checked() ─▶ what the learner found of them: counted or lost, and its worker may be excluded (`trust`)
    batch()  ──▶ the step's batch, formed once (sweep inside), handed out as often as asked
    provisioning    told of all of it: says when a group may start, who is parked, what it costs
    stepped() ─▶ the version rises; a published manifest raises what workers are asked for
    tick()   ──▶ leases without progress end; their groups wait to be leased again

One asyncio task at a time is inside (no awaits but for re-scoring); time is an argument. What a lease book, a queue
and a staleness bound guarantee is stated and tested in `planning`; here is only how they meet.

Invariants: nothing enters a batch that was not leased, verified and whole; the run ends when `steps` steps are done,
the model is saved and every evaluation asked for has its result; a worker whose leases bring nothing waits longer and
longer for the next, so that one broken machine does not use up what the others would have done.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from shoal.broadcast.store import Store
from shoal.config import Config
from shoal.coordinator.consumption import Consumption
from shoal.coordinator.draining import USUAL_S, Drain
from shoal.coordinator.evaluation import EvalRound, Evaluations
from shoal.coordinator.filtering import Filtering
from shoal.coordinator.journal import Journal
from shoal.coordinator.leasing import eval_lease, train_lease
from shoal.coordinator.pauses import Pauses
from shoal.coordinator.provisioning import Provisioning
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.tasks import TaskSource
from shoal.coordinator.trust import HOLD_S, Trust, Verdict, claims_of
from shoal.coordinator.verification import Limits, is_whole
from shoal.coordinator.verification import verdicts as verdicts_of
from shoal.envs.base import Environment
from shoal.errors import RunError, ShoalError
from shoal.planning.leases import LeaseBook
from shoal.planning.queue import GroupQueue
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Episode
from shoal.protocol.status import NodeState
from shoal.protocol.work import BatchReply, Lease, LeaseReply, StepReport, Submission

WAIT_S, MIN_WAIT_S = 0.25, 0.02
"""A worker without a lease asks again after this long; sooner, within these bounds, where pacing opens sooner."""

MAX_VOID_ATTEMPTS = 8
"""A group whose rollouts were void this often shows a broken environment or worker image, not bad luck."""


@dataclass
class _Leased:
    """A running lease and what it is for: a group's number, or an evaluation."""

    lease: Lease
    number: int | None
    round: EvalRound | None
    episodes: tuple[Episode, ...] = ()
    """What was handed in and is held until it is checked."""


class Control:
    """One run's state. `now` is always in seconds on one monotonic clock.

    Args:
        vocab_size: token ids of an episode are below this.
    """

    def __init__(
        self, config: Config, environments: Mapping[str, Environment], run: RunDir, *, vocab_size: int = 2**31
    ) -> None:
        self.config = config
        self._envs = environments
        self._run = run
        self._limits = Limits(config.model.context_tokens, vocab_size)
        self.filtering = Filtering(config, run)
        self._tasks = TaskSource(config, environments, self.filtering.wants)
        self._journal = Journal(run)
        self.book = LeaseBook()
        self.queue = GroupQueue(
            groups_per_step=config.rollout.groups_per_step,
            max_staleness=config.learner.max_staleness,
            window=config.rollout.window_groups,
        )
        interrupted = self._journal.replay(self.queue)
        self.version = 0
        """The learner's version: steps done."""
        self.published = -1
        """The newest version that workers can have; -1 before the learner has said so."""
        self._made = -1
        """The newest version that an earlier life of the run published."""
        self.lost = Counter[str]()
        """Groups leased again, by reason."""
        if interrupted:
            self.lost["interrupted"] += interrupted
        self._leased: dict[str, _Leased] = {}
        self._void_attempts: dict[int, Counter[str]] = {}
        """By group: how often each worker gave it up."""
        self._pauses = Pauses()
        self.trust = Trust(config.trust, config.model.dtype)
        self._made_by: dict[int, str] = {}
        """Buffered groups of workers that are checked: number -> who handed it in."""
        self.name_of: Callable[[str], str] = str
        """What people call a node, by its id."""
        self.consumption = Consumption(run)
        self._batch_facts: dict[str, int] = {}
        self._saved = False
        self._checkpoints = deque[int](maxlen=config.learner.keep_checkpoints)
        self._logged_step = run.last_logged_step()
        self.evals = Evaluations(config, run, self._tasks.heldout() if Evaluations.wanted(config) else [])
        self.failure: ShoalError | None = None
        self.provisioning = Provisioning(config, run)
        self.drain: Drain | None = None
        """Under way, where the run may cost no more."""

    @property
    def steps_done(self) -> bool:
        return self.version >= self.config.run.steps

    @property
    def ended(self) -> bool:
        """Nothing is left to do."""
        return self.failure is not None or (self.steps_done and self._saved and self.evals.complete)

    # Workers

    def resumed(self, version: int) -> None:
        """The run goes on from `version`; until the learner is there to give it out, workers use what they hold."""
        self._made = version

    def lease(self, node_id: str, free_slots: int, now: float) -> LeaseReply:
        """Work for a node with `free_slots` free, or how long to wait."""
        newest = max(0, self.published)
        if self.ended:
            return LeaseReply(ended=True, newest_version=newest)
        lease = None
        kept = max(self.published, self._made) < 0 or node_id in self.provisioning.parked or self.drain is not None
        if not kept and not self._pauses.waits(node_id, now)[1] and self.trust.may_lease(node_id, now):
            lease = self._eval_lease(node_id, free_slots, now) or self._train_lease(node_id, free_slots, now)
        opens_s = self.provisioning.opens_in(self.queue, now)
        wait_s = min(max(opens_s, MIN_WAIT_S), WAIT_S) if opens_s > 0 else WAIT_S
        return LeaseReply(lease=lease, wait_s=wait_s, newest_version=newest)

    def _eval_lease(self, node_id: str, free_slots: int, now: float) -> Lease | None:
        for round_ in self.evals.rounds.values():
            lease_id = f"e{round_.version}.{secrets.token_hex(4)}"
            indices = round_.lease(lease_id, free_slots)
            if not indices:
                continue
            lease = eval_lease(self.config, lease_id, round_, indices)
            self._leased[lease_id] = _Leased(lease, None, round_)
            self.book.grant(lease_id, node_id, len(indices), lease.duration_s, now)
            return lease
        return None

    def _train_lease(self, node_id: str, free_slots: int, now: float) -> Lease | None:
        size = self.config.rollout.group_size
        if free_slots < size or self.steps_done or not self.provisioning.admits(self.queue, now):
            return None
        if self.published < 0:
            started = self.provisioning.go_on(self.queue, node_id, self._made)
        else:
            started = self.provisioning.start(self.queue, node_id, self.published)
        if started is None:
            return None
        number, version = started
        self._journal.note("start", number)
        lease_id = f"g{number}.{secrets.token_hex(4)}"
        lease = train_lease(self.config, lease_id, self._tasks, number, version)
        self._leased[lease_id] = _Leased(lease, number, None)
        self.book.grant(lease_id, node_id, size, lease.duration_s, now)
        self.provisioning.started(lease_id, node_id, now)
        return lease

    def heartbeat(self, node_id: str, leases: Mapping[str, int], now: float) -> tuple[str, ...]:
        """Note progress; gives the leases that the node no longer holds."""
        return tuple(i for i, tokens in leases.items() if not self.book.progress(i, node_id, tokens, now))

    async def submit(self, submission: Submission, node_id: str, now: float) -> dict[str, str]:
        """Verify a lease's episodes and close it; gives each episode's verdict."""
        held = self._leased.get(submission.lease)
        holding = self.book.running.get(submission.lease)
        if held is None or holding is None or holding.node_id != node_id:
            return self._untimely(submission)
        if held.episodes:
            return {e.id: "checking" for e in submission.episodes}
        size = len(held.lease.tasks)
        # What comes beyond the lease is looked at by no tier, so it must not come along with what is.
        submission = replace(submission, episodes=submission.episodes[:size])
        newest = max(self.published, self._made)
        judged = await verdicts_of(held.lease, submission.episodes, node_id, newest, self._limits, self._envs)
        verdicts = [verdict for verdict, _ in judged]
        problems = [played.problem for _, played in judged if played.problem]
        if self.book.running.get(submission.lease) is not holding or held.episodes:
            return self._untimely(submission)  # it ended, or came a second time, while it was being checked
        whole = is_whole(verdicts, size)
        self.provisioning.ended(submission.lease, now, accepted=whole)
        self._note_problems(node_id, problems)
        plan = self.trust.plan(node_id, size, now) if held.number is not None and whole else "count"
        if plan != "count":
            claims = claims_of(held.lease, submission.episodes, [played for _, played in judged])
            self.trust.claim(submission.lease, node_id, claims, held=plan == "hold")
        if plan == "hold":
            held.episodes = submission.episodes
            self.book.hold(submission.lease, now, HOLD_S)
            self._pauses.ended(node_id, fruitful=True, now=now)
            return {e.id: "checking" for e in submission.episodes}
        if "rejected" in verdicts and self.trust.misbehaved(node_id, now):
            self._exclude(node_id, _first(problems), now)
        if self.book.running.get(submission.lease) is holding:
            verdicts = self._conclude(submission.lease, held, node_id, submission.episodes, verdicts, problems, now)
        return dict(zip((e.id for e in submission.episodes), verdicts, strict=False))

    def _conclude(
        self,
        lease_id: str,
        held: _Leased,
        node_id: str,
        episodes: tuple[Episode, ...],
        verdicts: list[str],
        problems: list[str],
        now: float,
    ) -> list[str]:
        """End a lease by its verdicts; gives them as they came to be."""
        del self._leased[lease_id]
        size = len(held.lease.tasks)
        whole = is_whole(verdicts, size)
        if held.number is not None and not whole:
            # Groups stay whole: what was fine in an incomplete group is void with it, and the group is leased again.
            verdicts = ["void" if v == "accepted" else v for v in verdicts]
        self._close(lease_id, node_id, verdicts, size)
        self._pauses.ended(node_id, fruitful="accepted" in verdicts, now=now)
        if held.round is not None:
            answers = [e if v == "accepted" else None for e, v in zip(episodes, verdicts, strict=False)]
            answers += [None] * (size - len(answers))
            self._answered(held.round, lease_id, answers, _first(problems))
        elif held.number is not None and whole:
            oldest = min(e.version for e in episodes)
            self._journal.accept(held.number, oldest, episodes)
            self.queue.finish(held.number, oldest)
            if not self.filtering.keeps(episodes):
                self._journal.sweep(self.queue.discard([held.number]))
            self.trust.counted(node_id, size)
            if self.trust.is_checked(node_id):
                self._made_by[held.number] = node_id
        elif held.number is not None:
            self._lose(held.number, "rejected" if "rejected" in verdicts else "void")
            if "rejected" not in verdicts or not self.trust.is_checked(node_id):
                self._count_void(held.number, node_id, problems)
        return verdicts

    def checked(self, verdicts: Iterable[Verdict], now: float) -> None:
        """What became of groups that the learner has checked."""
        for verdict in verdicts:
            node_id, reasons = verdict.node_id, verdict.reasons
            if reasons:
                self._note_problems(node_id, list(reasons.values()))
            if verdict.held:
                held = self._leased[verdict.lease_id]
                # Of several groups that are decided together, one may exclude whoever made another that is good.
                excluded = self.trust.state(node_id, now) == "excluded"
                good = "void" if verdict.gone or excluded else "accepted"
                each = ["rejected" if e.id in reasons else good for e in held.episodes]
                why = "its version is not kept any more" if verdict.gone else "its worker was excluded"
                problems = [*reasons.values()] or [why]
                self._conclude(verdict.lease_id, held, node_id, held.episodes, each, problems, now)
            if verdict.excludes:
                self._exclude(node_id, _first(list(reasons.values())), now)

    def _exclude(self, node_id: str, reason: str, now: float) -> None:
        """A worker's record is too bad: what it holds ends, and nothing of it trains the policy from here on."""
        self._run.event("worker.excluded", node_id, reason=reason[:500], **self.trust.account(node_id))
        for lease_id in self.trust.held_of(node_id):
            held = self._leased[lease_id]
            self.trust.forget(lease_id)
            self._conclude(lease_id, held, node_id, (), ["void"] * len(held.lease.tasks), [reason], now)
        self.provisioning.left(node_id)
        for holding in self.book.void_node(node_id):
            self._run.event("lease.void", node_id, lease=holding.lease_id, reason="excluded")
            self._release(holding.lease_id, "excluded")
        gone = self.queue.discard(number for number, maker in self._made_by.items() if maker == node_id)
        self._journal.sweep(gone)
        if gone:
            self._run.event("rollout.swept", groups=len(gone), step=self.version, reason="excluded")

    def _untimely(self, submission: Submission) -> dict[str, str]:
        how = self.book.ended.get(submission.lease, "unknown")
        return {e.id: "duplicate" if how == "finished" else "late" for e in submission.episodes}

    def why_idle(self, node_id: str, now: float) -> tuple[NodeState, str]:
        """Why a node without a lease has none."""
        if self.published < 0:
            return "idle", "no version can be had yet: the learner is starting"
        if node_id in self.provisioning.parked:
            return "parked", "others give the learner what it needs for less"
        if self.drain is not None:
            return "parked", self.drain.reason
        if not self.trust.may_lease(node_id, now):
            return "parked", self.trust.why_not(node_id, now)
        attempts, wait_s = self._pauses.waits(node_id, now)
        if wait_s:
            return "parked", f"its last {attempts} leases brought nothing; it may ask again in {wait_s:.0f} s"
        if self.steps_done:
            return "idle", "the last step is done"
        if self.queue.pending:
            return "idle", "between two leases"
        if not self.provisioning.admits(self.queue, now):
            return "idle", "a group started now would wait for the learner, and be staler than it need be"
        return "idle", "as many groups are started as the staleness bound allows"

    def _answered(self, round_: EvalRound, lease_id: str, answers: list[Episode | None], why: str) -> None:
        try:
            self.evals.answered(round_, lease_id, answers, why)
        except RunError as error:
            self.failure = error

    def _close(self, lease_id: str, node_id: str, verdicts: list[str], rollouts: int) -> None:
        counts = Counter(verdicts)
        void = rollouts - counts["accepted"] - counts["rejected"]
        closed = self.book.finish(
            lease_id, node_id, accepted=counts["accepted"], rejected=counts["rejected"], void=void
        )
        assert closed and self.book.is_conserved

    def _note_problems(self, node_id: str, problems: list[str]) -> None:
        for problem, count in Counter(problems).items():
            self._run.event("rollout.refused", node_id, reason=problem[:500], count=count)

    def _count_void(self, number: int, node_id: str, problems: list[str]) -> None:
        """End the run over a group that nobody can do; one worker's word for that is not enough if others are here."""
        attempts = self._void_attempts.setdefault(number, Counter())
        attempts[node_id] += 1
        is_alone = len(attempts) == 1 and self.trust.is_checked(node_id) and len(self.provisioning.active) > 1
        if attempts.total() >= MAX_VOID_ATTEMPTS and not is_alone:
            self.failure = RunError(
                f"group {number} failed {MAX_VOID_ATTEMPTS} times, last because {_first(problems)}",
                "Mend the environment or the workers; then continue with --resume.",
            )

    def tick(self, now: float) -> None:
        """End leases that show no progress."""
        for holding in self.book.expire(now):
            self._run.event("lease.expired", holding.node_id, lease=holding.lease_id)
            self.provisioning.ended(holding.lease_id, now, accepted=False)
            self._release(holding.lease_id, "expired")
        self._keep_budget(now)

    def _keep_budget(self, now: float) -> None:
        """Stop the run in order before it has cost more than it may."""
        if self.drain is None and not self.steps_done and self.provisioning.must_drain(USUAL_S, now):
            self.drain = Drain(f"the budget of {self.config.budget.max_usd:g} USD is used up", now)
            self._run.event("budget.drain", usd=self.provisioning.usd(now), step=self.version)
        if self.drain is not None and self.failure is None and self.drain.is_over(self.book.num_running, now):
            self.failure = self.drain.error(self.version, self.config.run.steps)

    def node_left(self, node_id: str, reason: str) -> None:
        """A worker said goodbye or died: its leases end now."""
        self.provisioning.left(node_id)
        for holding in self.book.void_node(node_id):
            self._run.event("lease.void", node_id, lease=holding.lease_id, reason=reason)
            self._release(holding.lease_id, reason)

    def _release(self, lease_id: str, reason: str) -> None:
        held = self._leased.pop(lease_id)
        self.trust.forget(lease_id)
        if held.round is not None:
            held.round.lost(lease_id)
        elif held.number is not None:
            self._lose(held.number, reason)

    def _lose(self, number: int, reason: str) -> None:
        self.queue.lost(number)
        self._journal.note("lost", number)
        self.lost[reason] += 1

    # The learner

    def batch(self, version: int, now: float) -> BatchReply:
        """The batch that makes `version` + 1, if it can be had now."""
        self.version = max(self.version, version)
        self.provisioning.asked(version, now)
        if self.ended:
            return BatchReply(version=version, ended=True)
        if version >= self.config.run.steps:
            return BatchReply(version=version)
        episodes = self._journal.batch(version)
        if episodes is None and version < self._journal.num_batches:
            self.failure = RunError(
                f"the learner asks for the batch of step {version + 1} again, which is no longer kept.",
                "Its newer checkpoints are gone or damaged; start a new run from the model you have.",
            )
            return BatchReply(version=version, ended=True)
        if episodes is None and self.drain is not None:
            return BatchReply(version=version, save=self.drain.saved_at is None)
        if episodes is None:
            episodes = self._form_batch(version)
        if episodes is not None:
            self.provisioning.served(version, len(self.queue.buffered), now)
            self._batch_facts = self.consumption.count(version, episodes, self.name_of)
            if self.config.output.keep_episodes:
                lines = b"".join(to_json(e) + b"\n" for e in episodes)
                self._run.write_atomic(f"episodes/{version:06d}.jsonl", lines)
        return BatchReply(version=version, episodes=episodes)

    def _form_batch(self, version: int) -> tuple[Episode, ...] | None:
        numbers, swept = self.queue.take(version)
        self._journal.sweep(swept)
        if swept:
            self._run.event("rollout.swept", groups=len(swept), step=version)
        if numbers is None:
            return None
        self.filtering.save()
        control = self.config.run.seed if self.config.rollout.shuffle_rewards else None
        return self._journal.form_batch(version, numbers, shuffle_seed=control)

    def stepped(self, report: StepReport, extra: Mapping[str, Any]) -> None:
        """The learner finished a step; or, without metrics, says at its start which version can be had."""
        if report.metrics:
            self.version = max(self.version, report.version)
            if report.version > self._logged_step:
                self._logged_step = report.version
                self._run.metric(kind="step", step=report.version, **report.metrics, **extra, **self._batch_facts)
        if report.manifest is not None:
            self.published = max(self.published, report.version)
            self.evals.published(self.published, self._kept_versions())
        if report.checkpointed:
            self._saved = self._saved or report.version >= self.config.run.steps
            self._checkpoints.append(report.version)
            if len(self._checkpoints) == self._checkpoints.maxlen:
                # Should the newest checkpoint turn out damaged, the learner goes back to the oldest that is kept.
                self._journal.forget_batches(self._checkpoints[0])

    def _kept_versions(self) -> list[int]:
        snapshots = Store(self._run.path / "snapshots", run=self._run.name, trusted_key=b"", read_only=True)
        return snapshots.versions("policy")


def _first(problems: list[str]) -> str:
    return problems[0] if problems else "episodes were missing"
