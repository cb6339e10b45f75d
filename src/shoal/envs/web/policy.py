"""Reference policies: what they are, and how they find things on a page.

A policy is a generator: it is made with the goal and the first page, yields an action, is sent the page that follows,
and ends when it has nothing more to do. It sees what an agent sees (the tree), and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from shoal.envs.web.actions import Action
from shoal.envs.web.tree import Node, Page
from shoal.errors import ShoalError

Policy = Generator[Action, Page, None]


class Lost(ShoalError):
    """A reference policy does not find what it needs: the page or the policy is wrong."""


def nodes(page: Page, role: str = "", name: str = "", where: Callable[[Node], bool] = lambda _: True) -> list[Node]:
    """The elements with this role and name (either may be left open) for which `where` holds, in order."""
    return [
        node
        for node in page.root.walk()
        if node.id and role in ("", node.role) and name in ("", node.name) and where(node)
    ]


def one(
    page: Page, role: str = "", name: str = "", nth: int = 0, where: Callable[[Node], bool] = lambda _: True
) -> str:
    """Id of the `nth` of `nodes`.

    Raises:
        Lost: there are not so many.
    """
    found = nodes(page, role, name, where)
    if len(found) <= nth:
        raise Lost(f"{page.url} shows no {role or 'element'} {name!r} number {nth + 1}.")
    return found[nth].id


def texts(page: Page) -> list[str]:
    """All names, in order, of texts and elements alike."""
    return [node.name for node in page.root.walk() if node.name]


def between(page: Page, before: str, after: str) -> str:
    """What a text on the page says between these words.

    Raises:
        Lost: no text holds them.
    """
    for text in texts(page):
        _, found, rest = text.partition(before)
        if found and after in rest:
            return rest.partition(after)[0]
    raise Lost(f"{page.url} says nothing between {before!r} and {after!r}.")
