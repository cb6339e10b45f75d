"""How a page is put before an agent: cut to a budget, scrolled, and with a grammar for what may be done on it.

Real episodes and dreamt ones read pages alike, so that what is learnt in one is of use in the other. Pure.
"""

from __future__ import annotations

from typing import Literal

from shoal.envs.web.actions import Scroll, action_grammar
from shoal.envs.web.tree import Page, Window, window
from shoal.protocol.sampling import Grammar

Constrain = Literal["no", "form", "seen"]

RULES = """You use a web page. Each element has its [id]. Answer with one action:
click [id]
type [id] [text] [1 to press Enter, else 0]
select [id] [option]
scroll [down] or scroll [up]
go_back
stop [answer, if one is asked for]
Stop when the task is done."""


def opening(instruction: str, shown: str) -> str:
    """The first message of an episode."""
    return f"{RULES}\n\nTask: {instruction}\n\n{shown}"


class Reading:
    """Where an agent is on a page.

    Args:
        budget_tokens: about how many tokens of a page are shown at once.
        constrain: as `WebSettings` says.
    """

    def __init__(self, budget_tokens: int, constrain: Constrain) -> None:
        self._budget_tokens = budget_tokens
        self._constrain = constrain
        self._starts = [0]
        """Where the windows begin that lead to the one shown."""
        self._window: Window | None = None

    @property
    def shown(self) -> Window:
        """What the agent sees now."""
        assert self._window is not None, "an episode begins with a window"
        return self._window

    def show(self, page: Page) -> str:
        """The part of the page that is to be seen."""
        self._window = window(page, self._budget_tokens, self._starts[-1])
        return self._window.text

    def grammar(self, page: Page) -> Grammar | None:
        """What the next reply must be; None where it is free."""
        if self._constrain == "no":
            return None
        shown = self.shown
        cut = shown.start > 0 or shown.end < shown.total
        return action_grammar(page, shown.ids if self._constrain == "seen" else None, can_scroll=cut)

    def scroll(self, action: Scroll) -> None:
        """Go to the part below or above, where there is one."""
        shown = self.shown
        if action.direction == "down" and shown.end < shown.total:
            self._starts.append(shown.end)
        elif action.direction == "up" and len(self._starts) > 1:
            self._starts.pop()

    def turn(self) -> None:
        """Another page is read from its top."""
        self._starts = [0]
