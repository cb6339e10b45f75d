"""Dreams as a page to read: whole, and nothing in it is markup by accident."""

from __future__ import annotations

from html.parser import HTMLParser

from dream_cases import category, home, node
from shoal.envs.dream.report import Scene, Story, page
from shoal.envs.dream.score import compare
from shoal.envs.web.sites.shop import Shop
from shoal.envs.web.tree import Page


class Tags(HTMLParser):
    """Which elements there are, and that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_shows_what_was_dreamt_and_what_came() -> None:
    before, after = home(), category(Shop(1, 3), "Kitchen")
    hostile = Page(url="http://shop.test/x", root=node("RootWebArea", "<script>alert(1)</script>"))
    scenes = tuple(
        Scene("click [12]", "It leads <there>.", before, dreamt, after, compare(before, after, dreamt), b"\x89PNG")
        for dreamt in (after, hostile)
    )
    text = page(
        "Dreams", {"world": "w<b>"}, {"Rows": [{"a": 1, "b": 0.51}], "None": []}, [Story("s", "do <it>", scenes)]
    )
    tags = Tags()
    tags.feed(text)
    assert not tags.open and "script" not in tags.seen and {"ins", "del", "img", "table"} <= tags.seen
    assert "1 of 2 pages exact" in text and "0.510" in text and "&lt;script&gt;" in text
    assert text.count("from the dream") == 1, "an exact page needs no second comparison"
