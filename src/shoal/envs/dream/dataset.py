"""What a world model learns from: collected episodes as questions and answers, and how much of them can be known.

Each transition is a question for what an act changes, each episode two or three for whether its task is done: yes at
the end of one that succeeded; no had it stopped earlier, at the end of one that failed, and where the task was another.

Invariants: pure, and the same for the same episodes; a question with its answer is there at most `MAX_COPIES` times,
whatever task it came up in, and one answer to different questions at most `MAX_SAME` times: what every page has in
common would else be most of what is learnt. A page that was come to twice is a part of the site, and is learnt from at
least `MIN_SAME` times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Literal

from shoal.envs.base import stable_int
from shoal.envs.dream.collect import Collected
from shoal.envs.dream.edit import FIELDS
from shoal.envs.dream.prompt import Sight, act_words, done_question, next_answer, next_question
from shoal.envs.dream.score import Atom, atoms
from shoal.envs.web.actions import Action, ActionError, GoBack, Scroll, Stop, read_action, write_action
from shoal.envs.web.tree import Page
from shoal.errors import StorageError
from shoal.protocol.codec import read_jsonl

EPISODES = "episodes.jsonl"
MAX_COPIES, MIN_SAME, MAX_SAME = 3, 5, 12
MAX_UNKNOWN = 12
TASK_LINE = re.compile(r"\nTask: [^\n]*\n")
UNCHANGED_SHARE = 0.1
"""Of the transitions that change nothing, so many are learnt from: the others say the same again."""


@dataclass(frozen=True, slots=True)
class Move:
    """A transition that a world model can be asked for, and where it comes from."""

    episode: str
    number: int
    """Of the act in its episode, from 0."""
    kind: str
    """The task's kind: `shop/put_one`."""
    instruction: str
    before: Page
    action: Action
    after: Page
    back: Page | None
    """The page that going back leads to, as it was."""

    @property
    def changed(self) -> bool:
        return self.before != self.after


def read_episodes(folders: Iterable[Path]) -> list[Collected]:
    """The episodes of folders that `shoal dream collect` wrote.

    Raises:
        StorageError: a folder has none.
        RecordError: a file is damaged.
    """
    found: list[Collected] = []
    for folder in folders:
        path = folder / EPISODES
        if not path.exists():
            raise StorageError(f"there are no episodes in {folder}.", "Collect some: shoal dream collect --out FOLDER.")
        found += read_jsonl(path, Collected)
    return found


def task_kind(episode: Collected) -> str:
    return episode.task.id.rpartition("/")[0]


def read_or_none(written: str) -> Action | None:
    """The action in a reply, None where there is none."""
    try:
        return read_action(written)
    except ActionError:
        return None


def moves(episode: Collected) -> Iterator[Move]:
    """The transitions of an episode; replies that were no act, and the last act, are none."""
    behind: list[Page] = []
    for number, (moment, following) in enumerate(zip(episode.moments, episode.moments[1:], strict=False)):
        action = read_or_none(moment.action)
        if action is None or isinstance(action, Stop):
            continue
        back = behind[-1] if behind else None
        before, after = moment.page, following.page
        yield Move(episode.id, number, task_kind(episode), episode.instruction, before, action, after, back)
        if isinstance(action, GoBack):
            behind = behind[:-1]
        elif after.url != before.url:
            behind.append(before)


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer."""

    ask: Literal["next", "done"]
    prompt: str
    completion: str


def next_examples(episodes: Iterable[Collected], sight: Sight, seed: int = 0) -> Iterator[Example]:
    """What acts change. Going back and scrolling are left out: a dream knows them without a model."""
    rng = Random(stable_int("unchanged", seed))
    for episode in episodes:
        for move in moves(episode):
            if isinstance(move.action, GoBack | Scroll) or not (move.changed or rng.random() < UNCHANGED_SHARE):
                continue
            prompt, _ = next_question(move.instruction, move.before, move.action, sight)
            yield Example("next", prompt, next_answer(move.before, move.action, move.after))


def done_examples(episodes: Sequence[Collected], sight: Sight, seed: int = 0) -> Iterator[Example]:
    """Whether tasks are done; as many yes as there are successes, and about as many no for each way not to be done."""
    rng = Random(stable_int("done", seed))
    others: dict[str, list[str]] = {}
    for episode in episodes:
        others.setdefault(task_kind(episode), []).append(episode.instruction)
    for episode in episodes:
        acts = told_acts(episode)
        last = episode.moments[-1].page
        right = episode.reward == 1.0
        yield Example("done", done_question(episode.instruction, acts, last, sight), "yes" if right else "no")
        if not right:
            continue
        if len(acts) > 2:
            # The act before `stop` is the one that does it, or finds the answer.
            cut = rng.randrange(1, len(acts) - 1)
            page = episode.moments[cut].page
            stopped = [*acts[:cut], write_action(Stop())]
            yield Example("done", done_question(episode.instruction, stopped, page, sight), "no")
        other = rng.choice(others[task_kind(episode)])
        if other != episode.instruction and not _same_words(other, episode.instruction):
            yield Example("done", done_question(other, acts, last, sight), "no")


def _same_words(one: str, other: str) -> bool:
    """Whether two instructions could ask for the same in other words: they have the same names and numbers."""

    def names(text: str) -> set[str]:
        return {word.strip('.,:;?!"') for word in text.split()[1:] if word[:1].isupper() or word[:1].isdigit()}

    return names(one) == names(other)


def told_acts(episode: Collected, number: int | None = None) -> list[str]:
    """The acts of an episode as the question for its end tells them; the first `number`, or all."""
    told = []
    for moment in episode.moments[:number]:
        action = read_or_none(moment.action)
        told.append(moment.action if action is None else act_words(action, moment.page))
    return told


def balanced(examples: Iterable[Example]) -> list[Example]:
    """Without what is there too often, and with more of what is there too seldom."""
    kept = thinned(examples)
    alike: dict[str, list[Example]] = {}
    for one in kept:
        if one.ask == "next":
            alike.setdefault(one.completion, []).append(one)
    for found in alike.values():
        if 1 < len(found) < MIN_SAME:
            kept += islice(cycle(found), MIN_SAME - len(found))
    return kept


def thinned(examples: Iterable[Example]) -> list[Example]:
    """Without what is there too often; the first ones stay."""
    seen: Counter[tuple[str, str]] = Counter()
    same: Counter[str] = Counter()
    kept = []
    for one in examples:
        changes = one.ask == "next"
        asked = TASK_LINE.sub("\n", one.prompt, count=1) if changes else one.prompt
        if seen[asked, one.completion] < MAX_COPIES and not (changes and same[one.completion] >= MAX_SAME):
            seen[asked, one.completion] += 1
            same[one.completion] += 1
            kept.append(one)
    return kept


@dataclass(frozen=True, slots=True)
class Unknown:
    """Transitions of one kind of task by one kind of act, some of whose atoms nothing tells."""

    kind: str
    act: str
    title: str
    """Of the page that it is done on, in one of them."""
    unknown: int
    transitions: int
    atom: Atom
    """One that nothing tells."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What somebody could reach who knows by heart all that was collected for training."""

    transitions: int
    determined: float
    """Share of the transitions whose every atom can be known."""
    edit_f1: float
    """Mean F1 of a prediction that has exactly the atoms that can be known."""
    unknown: tuple[Unknown, ...]
    """What cannot be known, the most frequent first; at most `MAX_UNKNOWN`."""


def bound(known: Iterable[Move], asked: Sequence[Move]) -> Bound:
    """An upper bound on what can be predicted of `asked`.

    An atom can be known if it is about states alone, as focus and ticks are; if each of its words is in the question
    (page, instruction, act); if the same act on a page of the same title led to that very atom before; if most of what
    the same act led to on any page had it; or, of going back, if the page was like that when it was left.
    """
    here: dict[tuple[str, ...], set[Atom]] = {}
    anywhere: dict[tuple[str, ...], Counter[Atom]] = {}
    times: Counter[tuple[str, ...]] = Counter()
    for move in known:
        act, found = _act(move), atoms(move.before, move.after)
        here.setdefault((move.before.title, *act), set()).update(found)
        anywhere.setdefault(act, Counter()).update(set(found))
        times[act] += 1
    whole, scores = 0, []
    total: Counter[tuple[str, ...]] = Counter()
    missed: dict[tuple[str, ...], list[tuple[str, Atom]]] = {}
    for move in asked:
        act, real = _act(move), atoms(move.before, move.after)
        read = set(_words(f"{move.instruction} {move.action} {move.before.text()}"))
        seen, often = here.get((move.before.title, *act), set()), anywhere.get(act, Counter())
        if isinstance(move.action, GoBack) and move.back is not None:
            seen = seen | set(atoms(move.before, move.back))
        lost = [
            atom
            for atom in real.elements()
            if not (
                atom in seen
                or 2 * often[atom] > times[act]
                or (atom[0] == "set" and atom[2] == "states")
                or set(_words(" ".join(part for part in atom[1:] if part not in FIELDS))) <= read
            )
        ]
        total[move.kind, *act] += 1
        if lost:
            missed.setdefault((move.kind, *act), []).append((move.before.title, lost[0]))
        whole += not lost
        share = 1 - len(lost) / real.total() if real else 1.0
        scores.append(2 * share / (1 + share))
    worst = sorted(missed.items(), key=lambda one: (-len(one[1]), one[0]))[:MAX_UNKNOWN]
    return Bound(
        len(asked),
        whole / max(1, len(asked)),
        sum(scores) / max(1, len(asked)),
        tuple(
            Unknown(key[0], " ".join(filter(None, key[1:])), found[0][0], len(found), total[key], found[0][1])
            for key, found in worst
        ),
    )


def _act(move: Move) -> tuple[str, ...]:
    node = None if isinstance(move.action, GoBack | Scroll | Stop) else move.before.find(move.action.id)
    return type(move.action).__name__.lower(), "" if node is None else f"{node.role} '{node.name}'"


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() else " " for char in text).casefold().split()


def by_place(asked: Sequence[Move], heldout_site: str) -> Mapping[str, list[Move]]:
    """Held-out transitions: of templates that were held out of known sites, and of the site that was."""
    found: dict[str, list[Move]] = {"template": [], "site": []}
    for move in asked:
        found["site" if move.kind.startswith(f"{heldout_site}/") else "template"].append(move)
    return found
