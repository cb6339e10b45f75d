"""What is asked of the encyclopedia."""

from __future__ import annotations

from random import Random

from shoal.envs.web.actions import Click, Stop, Type
from shoal.envs.web.policy import Policy, nodes, one
from shoal.envs.web.sites.template import Params, Template
from shoal.envs.web.sites.wiki import FACTS, REGIONS, Wiki
from shoal.envs.web.sites.words import TOPICS
from shoal.envs.web.tree import Page


class WikiTask(Template[Wiki]):
    site = Wiki

    def draw(self, site: Wiki, rng: Random) -> Params:
        town = rng.choice(site.towns)
        fact = rng.choice(FACTS)
        return {"town": town.title, "region": town.links[0], "fact": fact, "what": fact.lower()}


def fact(page: Page, name: str) -> str:
    """A fact of an article's table."""
    cells = [node.name for node in nodes(page, where=lambda node: node.role in ("cell", "gridcell"))]
    return cells[cells.index(name) + 1]


class FactOf(WikiTask):
    level = 1
    words = ("What does the article on {town} ({region}) give as {what}?", "{town} in {region}: look up {what}.")

    def answer(self, site: Wiki, p: Params) -> str:
        return site.articles[p["town"]].facts[p["fact"]]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        page = yield Click(one(page, "link", p["town"]))
        yield Stop(fact(page, p["fact"]))


class CapitalOf(WikiTask):
    level = 1
    words = ("What is the capital of {region}?", "Name the capital of {region}.")

    def answer(self, site: Wiki, p: Params) -> str:
        return site.articles[p["region"]].facts["Capital"]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        yield Stop(fact(page, "Capital"))


class FactOfCapital(WikiTask):
    level = 2
    words = ("Of the capital of {region}, what is given as {what}?", "Find {what} of the capital of {region}.")

    def draw(self, site: Wiki, rng: Random) -> Params:
        fact = rng.choice(FACTS)
        return {"region": rng.choice(REGIONS), "fact": fact, "what": fact.lower()}

    def answer(self, site: Wiki, p: Params) -> str:
        return site.articles[site.articles[p["region"]].facts["Capital"]].facts[p["fact"]]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        page = yield Click(one(page, "link", fact(page, "Capital")))
        yield Stop(fact(page, p["fact"]))


class Watch(WikiTask):
    level = 2
    words = ("Search for {town} and watch its article.", "Watch the article on {town}; the search finds it.")

    def do(self, site: Wiki, p: Params) -> None:
        site.articles[p["town"]].watched = True

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Search"), p["town"], enter=True)
        page = yield Click(one(page, "link", p["town"]))
        yield Click(one(page, "button", "Watch"))


class CorrectFact(WikiTask):
    level = 2
    words = (
        "Correct the population of {town} ({region}): it is {number}.",
        "Edit the article on {town} in {region}: population {number}.",
    )

    def draw(self, site: Wiki, rng: Random) -> Params:
        return {**super().draw(site, rng), "number": str(rng.randint(100_000, 200_000))}

    def do(self, site: Wiki, p: Params) -> None:
        site.edit(p["town"], {"Population": p["number"]})

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        page = yield Click(one(page, "link", p["town"]))
        page = yield Click(one(page, "link", "Edit facts"))
        page = yield Type(one(page, "textbox", "Population"), p["number"], enter=False)
        yield Click(one(page, "button", "Save"))


class UndoEdit(WikiTask):
    level = 2
    words = ("Undo the last edit of the article on {town} ({region}).", "{town} in {region}: take back the last edit.")

    def draw(self, site: Wiki, rng: Random) -> Params:
        edited = [town for town in site.towns if town.past] or site.towns
        town = rng.choice(edited)
        return {"town": town.title, "region": town.links[0], "edited": bool(town.past)}

    def do(self, site: Wiki, p: Params) -> None:
        # Where nothing was ever edited there is nothing to undo, and the right thing is to leave it.
        if p["edited"]:
            site.revert(p["town"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        page = yield Click(one(page, "link", p["town"]))
        if nodes(page, "button", "Undo last edit"):
            yield Click(one(page, "button", "Undo last edit"))


class WriteArticle(WikiTask):
    level = 2
    words = ('Write a new article "{title}" with the text "{text}".', 'Create the article "{title}": "{text}"')

    def draw(self, site: Wiki, rng: Random) -> Params:
        topic = rng.choice(TOPICS)
        return {"title": f"History of {topic}", "text": f"People have had {topic} for {rng.randint(2, 40)} centuries"}

    def do(self, site: Wiki, p: Params) -> None:
        site.create(p["title"], p["text"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "New article"))
        page = yield Type(one(page, "textbox", "Title"), p["title"], enter=False)
        page = yield Type(one(page, "textbox", "Text"), p["text"], enter=False)
        yield Click(one(page, "button", "Create"))


class LargerTown(WikiTask):
    level = 3
    words = (
        "Which has more people, {town} or {other}? Both are in {region}.",
        "{region}: is {town} or {other} larger?",
    )

    def draw(self, site: Wiki, rng: Random) -> Params:
        region = rng.choice(REGIONS)
        town, other = rng.sample(site.articles[region].links, 2)
        return {"region": region, "town": town, "other": other}

    def answer(self, site: Wiki, p: Params) -> str:
        towns: list[str] = [p["town"], p["other"]]
        return max(towns, key=lambda town: int(site.articles[town].facts["Population"]))

    def solve(self, page: Page, p: Params) -> Policy:
        sizes: dict[int, str] = {}
        for town in (p["town"], p["other"]):
            page = yield Click(one(page, "link", "Contents" if sizes else p["region"]))
            if sizes:
                page = yield Click(one(page, "link", p["region"]))
            page = yield Click(one(page, "link", town))
            sizes[int(fact(page, "Population"))] = town
        yield Stop(sizes[max(sizes)])


class CorrectTwo(CorrectFact):
    level = 3
    words = (
        "Edit the article on {town} ({region}): population {number}, founded {year}.",
        "{town} in {region} was founded in {year} and has {number} people: correct both facts.",
    )

    def draw(self, site: Wiki, rng: Random) -> Params:
        return {**super().draw(site, rng), "year": str(rng.randint(1901, 1999))}

    def do(self, site: Wiki, p: Params) -> None:
        site.edit(p["town"], {"Population": p["number"], "Founded": p["year"]})

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["region"]))
        page = yield Click(one(page, "link", p["town"]))
        page = yield Click(one(page, "link", "Edit facts"))
        page = yield Type(one(page, "textbox", "Population"), p["number"], enter=False)
        page = yield Type(one(page, "textbox", "Founded"), p["year"], enter=False)
        yield Click(one(page, "button", "Save"))


TEMPLATES = (
    FactOf(),
    CapitalOf(),
    FactOfCapital(),
    Watch(),
    CorrectFact(),
    UndoEdit(),
    WriteArticle(),
    LargerTown(),
    CorrectTwo(),
)
