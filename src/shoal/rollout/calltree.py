"""What an agent asked a model and was given, as the tree of turns that one episode holds.

A *call* is one completion. A later call continues an earlier one where its conversation begins with all that the
earlier one was asked and answered; then the token ids recorded so far are its prompt's beginning, and only what came
after is tokenised. A conversation that begins otherwise (another system message, an edited history, another list of
tools) is a root of its own.

Invariants: nothing recorded is ever tokenised again; a call's prompt is exactly the ids of the calls that it continues
and its own context behind them; a call is recorded after those that it continues. A pure state machine: no clock, no
socket.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.episode import MAX_TURNS, Turn
from shoal.protocol.sampling import Completion, Grammar

ROOT = -1


@dataclass(frozen=True)
class Call:
    """One completion, and the conversation that it ends."""

    parent: int
    """Index of the call that it continues, or `ROOT`."""
    context_ids: tuple[int, ...]
    """Read since then."""
    completion: Completion
    grammar: Grammar | None
    shown: str
    """What was asked last, for people."""
    conversation: tuple[str, ...]
    """What was asked and answered, one text a message, told apart as the caller likes; the answer is the last."""
    setting: str
    """What else the prompt depends on, such as the tools offered."""

    @property
    def text(self) -> str:
        return "".join(self.conversation)


@dataclass(frozen=True)
class Place:
    """Where a new call belongs."""

    parent: int = ROOT
    ids: tuple[int, ...] = ()
    """Token ids that its prompt begins with."""
    known: int = 0
    """How much of its conversation these are: messages, or characters of a text."""


class CallTree:
    """All calls of one session."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @property
    def num_tokens(self) -> int:
        """Token ids recorded, contexts and completions."""
        return sum(len(call.context_ids) + len(call.completion.token_ids) for call in self.calls)

    def place(self, conversation: Sequence[str], setting: str) -> Place:
        """Where a call with these messages belongs: behind the longest conversation that they begin with."""
        best = Place()
        for index, call in enumerate(self.calls):
            known = len(call.conversation)
            longer = best.known < known < len(conversation) and call.setting == setting
            if longer and call.conversation == tuple(conversation[:known]):
                best = Place(index, (), known)
        return self._with_ids(best)

    def place_text(self, text: str, setting: str) -> Place:
        """As `place`, of a prompt that is one text: behind the longest prompt with its answer that it begins with."""
        best = Place()
        for index, call in enumerate(self.calls):
            known = len(call.text)
            if best.known < known <= len(text) and call.setting == setting and text.startswith(call.text):
                best = Place(index, (), known)
        return self._with_ids(best)

    def place_ids(self, ids: Sequence[int], setting: str) -> Place:
        """As `place`, of a prompt that is token ids."""
        best = Place()
        for index, call in enumerate(self.calls):
            if call.setting == setting:
                recorded = self.sequence(index)
                if best.known < len(recorded) <= len(ids) and tuple(ids[: len(recorded)]) == recorded:
                    best = Place(index, recorded, len(recorded))
        return best

    def sequence(self, index: int) -> tuple[int, ...]:
        """All token ids up to the end of a call's completion."""
        parts: list[tuple[int, ...]] = []
        while index != ROOT:
            call = self.calls[index]
            parts += [call.completion.token_ids, call.context_ids]
            index = call.parent
        return tuple(token for part in reversed(parts) for token in part)

    def add(self, call: Call) -> None:
        """Record a call; what it continues is there already."""
        assert ROOT <= call.parent < len(self.calls) and len(self.calls) < MAX_TURNS
        assert call.parent != ROOT or call.context_ids, "a prompt has tokens"
        self.calls.append(call)

    def turns(self) -> tuple[Turn, ...]:
        """The episode's turns, in the order in which the calls ended."""
        return tuple(
            Turn(
                context_ids=call.context_ids,
                observation=call.shown,
                completion=call.completion,
                grammar=call.grammar,
                after=None if call.parent == index - 1 else call.parent,
            )
            for index, call in enumerate(self.calls)
        )

    def without(self, patterns: Sequence[re.Pattern[str]]) -> CallTree:
        """The tree without every call in whose conversation a pattern is found, nor those that continue such a one.

        A conversation holds all that was asked and answered before, so what is left has been nowhere near it.
        """
        kept = CallTree()
        places: dict[int, int] = {ROOT: ROOT}
        for index, call in enumerate(self.calls):
            told = (*call.conversation, call.shown, call.setting, call.completion.text)
            if call.parent not in places or any(pattern.search(text) for pattern in patterns for text in told):
                continue
            places[index] = len(kept.calls)
            kept.calls.append(
                Call(
                    places[call.parent],
                    call.context_ids,
                    call.completion,
                    call.grammar,
                    call.shown,
                    call.conversation,
                    call.setting,
                )
            )
        return kept

    def _with_ids(self, place: Place) -> Place:
        return place if place.parent == ROOT else Place(place.parent, self.sequence(place.parent), place.known)
