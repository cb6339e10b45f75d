"""One dream: a page, acts on it, and the pages that a world model says come next.

Invariant: an act that cannot be done on the dreamt page is an `ActionError`, as on a real one, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.envs.dream.prompt import act_words
from shoal.envs.dream.world import Prediction, World
from shoal.envs.web.actions import (
    TEXT_ROLES,
    Action,
    ActionError,
    GoBack,
    Scroll,
    Select,
    Stop,
    Type,
    options_of,
    target,
)
from shoal.envs.web.tree import Node, Page


def check_act(action: Action, page: Page) -> Node | None:
    """The element that an act is about, once it is known that it can be done as far as the page says.

    Raises:
        ActionError: it cannot.
    """
    node = target(action, page)
    if isinstance(action, Type) and node is not None and node.role not in TEXT_ROLES:
        raise ActionError(f"[{action.id}] is no field that can be typed into.")
    if isinstance(action, Select) and node is not None:
        options = options_of(node)
        if not options:
            raise ActionError(f"[{action.id}] is no list to select from.", "Click on it instead.")
        if action.option not in options:
            raise ActionError(f"[{action.id}] has no option {action.option[:60]!r}.")
    return node


@dataclass
class Dream:
    """A task going on in a world model."""

    world: World
    instruction: str
    page: Page
    told: list[str] = field(default_factory=list)
    """The acts so far, as the question for the end tells them; those before the dream included."""
    behind: list[Page] = field(default_factory=list)
    """Pages that going back leads to, the next one last."""

    async def act(self, action: Action) -> Prediction:
        """Do one act, and go on to the page that is predicted.

        Raises:
            ActionError: it cannot be done; the page is as it was.
            ShoalError: the world model fails.
        """
        check_act(action, self.page)
        if isinstance(action, GoBack) and not self.behind:
            raise ActionError("There is no page to go back to.")
        self.told.append(act_words(action, self.page))
        if isinstance(action, Stop | Scroll):
            return Prediction(self.page)
        came = await self.world.next(self.instruction, self.page, action, self.behind[-1] if self.behind else None)
        if isinstance(action, GoBack):
            self.behind.pop()
        elif came.page.url != self.page.url:
            self.behind.append(self.page)
        self.page = came.page
        return came

    async def done(self) -> bool:
        """Whether the world model takes the task to be done, by what was done and the page."""
        return await self.world.done(self.instruction, self.told, self.page)
