"""A small encyclopedia of invented towns and regions, which can be edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from random import Random
from typing import Any

from shoal.envs.web.sites.site import Form, Refused, Site, area, cell, field, form, lines, link, slug, table, text
from shoal.envs.web.sites.words import TOWNS, people

REGIONS = ("Northmark", "Eastvale", "Southmoor")
RIVERS = ["Alder", "Birch", "Cedar", "Drift", "Elder", "Fern"]
FACTS = ("Population", "Founded", "Mayor", "River")


@dataclass
class Article:
    title: str
    facts: dict[str, str]
    links: list[str]
    text: str
    watched: bool = False
    past: list[dict[str, str]] = default(default_factory=list)
    """Facts before each edit, the oldest first."""


class Wiki(Site):
    host = "wiki.test"
    title = "Townpedia"
    menu = {"/": "Contents", "/watched": "Watched", "/new": "New article"}

    def fill(self, rng: Random, content: Random) -> None:
        self.articles: dict[str, Article] = {}
        towns = content.sample(TOWNS, 9)
        mayors = people(content, 9)
        sizes = content.sample(range(1_000, 90_000, 7), 9)
        for number, town in enumerate(towns):
            facts = {
                "Population": str(sizes[number]),
                "Founded": str(content.randint(800, 1900)),
                "Mayor": mayors[number],
                "River": content.choice(RIVERS),
            }
            region = REGIONS[number % len(REGIONS)]
            article = Article(town, facts, [region], f"{town} is a town in {region}.")
            if content.random() < 0.5:
                article.past.append({**facts, "Population": str(content.randint(1_000, 90_000))})
            self.articles[town] = article
        for number, region in enumerate(REGIONS):
            inside = towns[number :: len(REGIONS)]
            capital = content.choice(inside)
            self.articles[region] = Article(region, {"Capital": capital}, sorted(inside), f"{region} is a region.")

    def state(self) -> Any:
        return self.articles

    @property
    def towns(self) -> list[Article]:
        return [one for one in self.articles.values() if "Mayor" in one.facts]

    def edit(self, title: str, facts: Form) -> None:
        article = self.articles[title]
        changed = {name: facts.get(name) or old for name, old in article.facts.items()}
        if changed != article.facts:
            article.past.append(article.facts)
            article.facts = changed

    def revert(self, title: str) -> None:
        article = self.articles[title]
        if not article.past:
            raise Refused("There is no earlier version.")
        article.facts = article.past.pop()

    def create(self, title: str, words: str) -> None:
        if not title or not words or any(slug(title) == slug(known) for known in self.articles):
            raise Refused("An article needs a title of its own and some text.")
        self.articles[title] = Article(title, {}, [], words)

    def _named(self, name: str) -> Article | None:
        return next((one for one in self.articles.values() if slug(one.title) == name), None)

    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        match path:
            case []:
                search = form("/search", field("Search", "q"), button="Go", method="get")
                regions = (article for article in self.articles.values() if "Capital" in article.facts)
                return self.title, search + lines(self._link(article) for article in regions)
            case ["search"]:
                asked = query.get("q", "").casefold()
                found = [one for one in self.articles.values() if asked and asked in one.title.casefold()]
                return "Search", lines(map(self._link, found)) or text("Nothing was found.")
            case ["watched"]:
                found = [one for one in self.articles.values() if one.watched]
                return "Watched", lines(map(self._link, found)) or text("You watch no article.")
            case ["new"]:
                return "New article", form("/new", field("Title", "title"), area("Text", "text"), button="Create")
            case ["article", name]:
                article = self._named(name)
                return None if article is None else (article.title, self._read(article))
            case ["article", name, "edit"]:
                article = self._named(name)
                if article is None:
                    return None
                fields = [field(fact, fact, value) for fact, value in article.facts.items()]
                return f"Edit {article.title}", form(f"/article/{name}/edit", *fields, button="Save")
        return None

    def _link(self, article: Article) -> str:
        return link(f"/article/{slug(article.title)}", article.title)

    def _read(self, article: Article) -> str:
        at = f"/article/{slug(article.title)}"
        return (
            text(article.text)
            + table(("Fact", "Value"), ((cell(name), cell(value)) for name, value in article.facts.items()))
            + lines(self._link(self.articles[title]) for title in article.links)
            + link(f"{at}/edit", "Edit facts")
            + form(f"{at}/watch", button="Unwatch" if article.watched else "Watch")
            + (form(f"{at}/revert", button="Undo last edit") if article.past else "")
        )

    def submit(self, path: Sequence[str], form: Form) -> str | None:
        match path:
            case ["new"]:
                self.create(form.get("title", ""), form.get("text", ""))
                return f"/article/{slug(form['title'])}"
            case ["article", name, "edit" | "watch" | "revert" as act]:
                article = self._named(name)
                if article is None:
                    return None
                if act == "edit":
                    self.edit(article.title, form)
                elif act == "watch":
                    article.watched = not article.watched
                else:
                    self.revert(article.title)
                return f"/article/{name}"
        return None
