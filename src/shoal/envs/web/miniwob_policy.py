"""What the reference policies for MiniWoB++ share: the register of them, and how they read an instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

from shoal.envs.web.actions import Click
from shoal.envs.web.policy import Lost, Policy, nodes, one
from shoal.envs.web.tree import Node, Page

Maker = Callable[[str, Page], Policy]

MAX_TRIES = 40
"""A policy that looks for something gives up after so many acts."""
SOLVERS: dict[str, Maker] = {}
"""Task -> policy."""


def solves(*tasks: str) -> Callable[[Maker], Maker]:
    """Enter a policy under its tasks."""

    def enter(maker: Maker) -> Maker:
        SOLVERS.update(dict.fromkeys(tasks, maker))
        return maker

    return enter


def quoted(goal: str) -> list[str]:
    """What stands in double quotes."""
    return re.findall(r'"([^"]*)"', goal)


def ordinal(goal: str) -> int:
    """The first ordinal, from 0."""
    found = re.search(r"(\d+)(?:st|nd|rd|th)", goal)
    if found is None:
        raise Lost(f"{goal!r} holds no ordinal.")
    return int(found[1]) - 1


def submit(page: Page) -> Click:
    return Click(one(page, where=lambda node: node.name.lower() in ("submit", "search", "login", "ok", "go!")))


def fields(page: Page) -> list[Node]:
    return nodes(page, "textbox")
