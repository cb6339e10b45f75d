"""How good a predicted page is, measured by what it changes. Pure.

A change is a bag of *atoms*: one for a new address, one for each field that is set, one for each node that goes or
comes (with its whole line, under its parent). F1 compares the bag of the real change with that of the predicted one,
both computed by `edit.diff` from the pages alone, so it does not matter by which edits a model said what it said.

1. The place among its siblings is no part of an atom: one node too few above does not make all below it wrong. `exact`,
   which compares whole pages, sees every order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from shoal.envs.dream.edit import Insert, Load, Navigate, Remove, Set, diff
from shoal.envs.web.tree import Node, Page

Atom = tuple[str, ...]


def atoms(before: Page, after: Page) -> Counter[Atom]:
    """The change from one page to another, in its smallest parts."""
    found: Counter[Atom] = Counter()
    old = {node.id: node for node in before.root.walk() if node.id}

    def at(target: str) -> Node | None:
        if target in old:
            return old[target]
        parent, _, place = target.rpartition(".")
        below = old[parent].children if parent in old else before.root.children
        return below[int(place)] if place.isdecimal() and int(place) < len(below) else None

    def come(parent: str, node: Node) -> None:
        found["insert", parent, node.line()] += 1
        for child in node.children:
            come(node.id or parent, child)

    for edit in diff(before, after):
        match edit:
            case Navigate(url):
                found["navigate", url] += 1
            case Remove(target):
                gone = at(target)
                for node in gone.walk() if gone is not None else ():
                    found["remove", node.line()] += 1
            case Set(target, which, value):
                found["set", target, which, value] += 1
            case Insert(parent, _, node):
                come(parent, node)
            case Load():
                raise AssertionError("diff says nothing by another document")
    return found


def f1(real: Counter[Atom], predicted: Counter[Atom]) -> float:
    """Harmonic mean of precision and recall; 1 where both change nothing."""
    total = real.total() + predicted.total()
    return 2 * (real & predicted).total() / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Match:
    """One prediction against what really came."""

    exact: float
    edit_f1: float


def compare(before: Page, after: Page, predicted: Page) -> Match:
    """How a predicted page does, for one that really came after `before`."""
    return Match(float(predicted == after), f1(atoms(before, after), atoms(before, predicted)))


def mean(matches: Iterable[Match]) -> dict[str, float]:
    """Means over predictions, each counting alike; empty where there are none."""
    rows = list(matches)
    if not rows:
        return {}
    return {"exact": fmean(row.exact for row in rows), "edit_f1": fmean(row.edit_f1 for row in rows)}
