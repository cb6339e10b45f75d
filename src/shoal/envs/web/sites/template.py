"""A task template: what is asked of a site, what must have become of it, and a policy that does it.

Whether an episode succeeded is decided by comparison: `do` carries out what was asked on a second site of the same
seed, and the site that the agent used must be in the same state. So what was not asked for counts as a mistake as well.
Where the task asks for an answer, that is compared too.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from random import Random
from typing import Any, ClassVar, Generic, TypeVar

from shoal.envs.base import stable_int
from shoal.envs.web.policy import Policy
from shoal.envs.web.sites.site import Site
from shoal.envs.web.tree import Page

S = TypeVar("S", bound=Site)

Params = dict[str, Any]


class Template(ABC, Generic[S]):
    """One kind of task."""

    site: type[S]
    """Where it is set."""
    level: ClassVar[int]
    """1: one or two pages; 2: several; 3: several acts that depend on each other."""
    words: ClassVar[tuple[str, ...]]
    """Ways to put it."""

    @property
    def id(self) -> str:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{self.site.host.partition('.')[0]}/{name}"

    @abstractmethod
    def draw(self, site: S, rng: Random) -> Params:
        """What this instance asks for, given the fresh site."""

    def do(self, site: S, p: Params) -> None:
        """Carry it out. Tasks that ask for nothing but an answer change nothing."""
        return None

    def answer(self, site: S, p: Params) -> str | None:
        """The answer that is asked for, from the fresh site; None where none is."""
        return None

    @abstractmethod
    def solve(self, page: Page, p: Params) -> Policy:
        """The reference policy. It may use the parameters, which the instruction says as well, and what it reads."""


class Instance(Generic[S]):
    """One task of a template; its site is about what `content` says (see `Site`)."""

    def __init__(self, template: Template[S], seed: int, content: int | None = None) -> None:
        self.template = template
        self.site = template.site(seed, content)
        """The one that the agent uses."""
        rng = Random(stable_int("template", template.id, seed))
        self.params = template.draw(template.site(seed, content), rng)
        self.instruction = rng.choice(template.words).format(**self.params)

    def policy(self, page: Page) -> Policy:
        """The reference policy for this instance."""
        return self.template.solve(page, self.params)

    @property
    def wanted(self) -> str | None:
        """The answer that is asked for; None where none is."""
        return self.template.answer(self._unused(), self.params)

    def _unused(self) -> S:
        return self.template.site(self.site.seed, self.site.content)

    def succeeded(self, answer: str) -> bool:
        """Whether the site is as it should be, and the answer is right."""
        wanted = self.wanted
        expected = self._unused()
        self.template.do(expected, self.params)
        return self.site.state() == expected.state() and (wanted is None or same(answer, wanted))


def same(said: str, wanted: str) -> bool:
    """Whether two answers are the same but for case, spaces, and a full stop or currency mark."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().replace("£", "").strip().rstrip(".").split())

    return plain(said) == plain(wanted)
