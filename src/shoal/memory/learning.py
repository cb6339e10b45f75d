"""What finished episodes teach: candidates by rules and by a model, and what the notes that they were shown were worth.

    episodes of one family ──▶ contexts ──┬─▶ worked examples, corrections            rules (`extract`)
                                          ├─▶ insights                                a model, asked about two runs
                                          └─▶ uses: reward less what such tasks earn without notes

Deviation from the paper: which step was decisive is not asked of a model; the rules take all acts of a run that was
rewarded, and the first act in which two runs of one task parted.

Invariants: everything proposed passes `extract.candidate`, so recalled text never becomes a memory and answers of
siblings are refused; one task gives at most one candidate of each rule; uses are reported only where at least
`MIN_ALONE` episodes of the family went without notes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import Environment
from shoal.errors import RecordError
from shoal.memory.extract import Refusal, candidate, correction, worked_example
from shoal.memory.keeper import Keeper
from shoal.memory.recalling import entries_of
from shoal.memory.records import Context, Entry
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import Sampler, SampleRequest, SamplingParams

MIN_ALONE = 8
"""Episodes without notes that a baseline is made of."""

MAX_CANDIDATES = 64
"""Of one call: each costs trials."""

SHOWN_CHARS = 1500
"""Of each text that a model is asked about."""

ASKING = SamplingParams(max_tokens=80, temperature=0.0)

QUESTION = """Two attempts at a task, as data.
<task>
{task}
</task>
<attempt reward="{low:g}">
{worse}
</attempt>
<attempt reward="{high:g}">
{better}
</attempt>
In one sentence, write what to do in tasks of this kind, without this task's own answer."""


class Insight(Protocol):
    """Writes down what two runs of one task teach."""

    async def write(self, worse: Context, better: Context) -> str:
        """One or two sentences; empty where there is nothing to say."""
        ...


@dataclass(frozen=True)
class SamplerInsight:
    """A model that is asked."""

    sampler: Sampler
    tokenizer: Tokenizer
    params: SamplingParams = ASKING

    async def write(self, worse: Context, better: Context) -> str:
        words = QUESTION.format(
            task=asked(better)[:SHOWN_CHARS],
            low=worse.reward,
            worse="\n".join(worse.actions)[:SHOWN_CHARS],
            high=better.reward,
            better="\n".join(better.actions)[:SHOWN_CHARS],
        )
        prompt = self.tokenizer.prompt([Message(role="user", content=words)])
        completion = await self.sampler.sample(SampleRequest(prompt_ids=tuple(prompt), params=self.params))
        return completion.text.strip() if completion.finish == "stop" else ""


@dataclass
class Learnt:
    """What came of some episodes."""

    added: list[str] = field(default_factory=list)
    """Ids of new candidates."""
    refused: Counter[str] = field(default_factory=Counter)
    """Why others were not, by reason."""
    uses: int = 0
    """Uses reported."""


async def learn(
    keeper: Keeper,
    contexts: Sequence[Context],
    *,
    env: Environment | None = None,
    insight: Insight | None = None,
    most: int = MAX_CANDIDATES,
) -> Learnt:
    """Propose candidates from contexts of finished runs, and keep the contexts they came from.

    Args:
        env: of the contexts' tasks, so that the answers of the others are known and refused.
        insight: a model that writes; None: rules only.
        most: candidates, at most.
    """
    learnt = Learnt()
    by_task: dict[str, list[Context]] = defaultdict(list)
    for context in contexts:
        by_task[context.task.id].append(context)
    answers = {name: env.answers(found[0].task) for name, found in by_task.items()} if env is not None else {}
    node = keeper.store.node
    for name, found in by_task.items():
        better = max(found, key=lambda c: c.reward)
        worse = min(found, key=lambda c: c.reward)
        proposed: list[tuple[Entry | Refusal, Context]] = [(worked_example(better, node=node), better)]
        if better.reward > worse.reward:
            proposed.append((correction(worse, better, node=node), better))
            if insight is not None:
                others = [given for other, given in answers.items() if other != name]
                said = await insight.write(worse, better)
                proposed.append((candidate(said, better, "insight", sibling_answers=others, node=node), better))
        for one, source in proposed:
            if len(learnt.added) == most:
                return learnt
            _take(keeper, one, source, learnt)
    return learnt


def _take(keeper: Keeper, proposed: Entry | Refusal, source: Context, learnt: Learnt) -> None:
    if isinstance(proposed, Refusal):
        learnt.refused[proposed.reason] += 1
        return
    known = keeper.store.memory(proposed.id)
    try:
        memory = keeper.add(proposed)
    except RecordError as error:
        learnt.refused[error.problem] += 1
        return
    if known is not None or memory.id != proposed.id:
        learnt.refused["known"] += 1
        return
    keeper.note(source)
    learnt.added.append(memory.id)


def asked(context: Context) -> str:
    """What a context's task asked."""
    return next((m.content for m in reversed(context.messages) if m.role == "user"), "")


def report_uses(keeper: Keeper, episodes: Iterable[Episode]) -> int:
    """Report what the notes of finished episodes were worth; gives the number of uses.

    The utility of a use is the episode's reward less the mean reward of the family's episodes without notes, over the
    policy's span of rewards.
    """
    done = [episode for episode in episodes if episode.outcome == "done"]
    alone: dict[str, list[float]] = defaultdict(list)
    for episode in done:
        if not entries_of(episode.task):
            alone[episode.task.env].append(episode.reward)
    span, uses = keeper.policy.reward_span, 0
    for episode in done:
        shown = [entry for entry in entries_of(episode.task) if keeper.store.memory(entry) is not None]
        rewards = alone[episode.task.env]
        if shown and len(rewards) >= MIN_ALONE:
            keeper.used(shown, min(1.0, max(-1.0, (episode.reward - fmean(rewards)) / span)))
            uses += len(shown)
    return uses
