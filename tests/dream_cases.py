"""Collected episodes made by hand, of pages as the shop has them, and a model small enough to be fitted in a test."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.envs.dream.collect import Collected, Moment
from shoal.envs.web.sites.shop import Shop
from shoal.envs.web.sites.template import Instance
from shoal.envs.web.sites.templates import TEMPLATES
from shoal.envs.web.tree import Node, Page
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Task

CONTENT = 3
WEB = {"content": CONTENT, "constrain": "seen", "worlds": ("shop",), "heldout": "instance"}


def node(role: str, name: str, id_: str = "", children: Sequence[Node] = (), **rest: object) -> Node:
    return Node(role=role, name=name, id=id_, children=tuple(children), **rest)  # type: ignore[arg-type]


MENU = node("navigation", "", "5", [node("link", "Home", "6"), node("link", "Basket", "7")])


def home() -> Page:
    links = [node("link", name, str(12 + 2 * place)) for place, name in enumerate(("Kitchen", "Garden", "Office"))]
    root = node("RootWebArea", "Corner Shop", children=[MENU, node("textbox", "Search", "10"), *links])
    return Page(url="http://shop.test/", root=root)


def category(shop: Shop, name: str) -> Page:
    rows: list[Node] = []
    for place, product in enumerate(shop.in_category(name)):
        rows += [node("link", product.name, str(11 + 2 * place)), node("StaticText", f"£{product.price}")]
    return Page(
        url=f"http://shop.test/category/{name.lower()}",
        root=node("RootWebArea", name, children=[MENU, node("heading", name, "9"), *rows]),
    )


def product_page(shop: Shop, item: str) -> Page:
    product = shop.product(item)
    number = shop.stock.products.index(product)
    words = f"Price: £{product.price}. Stars: {product.stars} of 5."
    form = node("form", "", "12", [node("textbox", "Quantity", "15", value="1"), node("button", "Add to basket", "16")])
    root = node("RootWebArea", item, children=[MENU, node("heading", item, "9"), node("StaticText", words), form])
    return Page(url=f"http://shop.test/product/{number}", root=root)


def episode(seed: int, *, reward: float = 1.0, split: str = "train") -> Collected:
    """What the reference policy does to find a price."""
    instance = Instance(TEMPLATES["shop/price_of"], seed, CONTENT)
    p, shop = instance.params, instance.site
    pages = [home(), category(shop, p["category"]), product_page(shop, p["item"])]

    def link(page: Page, name: str) -> str:
        return next(one.id for one in page.root.walk() if one.role == "link" and one.name == name)

    acts = [
        f"click [{link(pages[0], p['category'])}]",
        f"click [{link(pages[1], p['item'])}]",
        f"stop [{instance.wanted if reward else 'no idea'}]",
    ]
    moments = tuple(
        Moment(page=page, action=action, shown=page.text()) for page, action in zip(pages, acts, strict=True)
    )
    return Collected(
        id=f"shop/price_of/{seed}/reference/{seed}",
        task=Task(env="web", id=f"shop/price_of/{seed}", seed=seed),
        split=split,  # type: ignore[arg-type]
        policy="reference",
        instruction=instance.instruction,
        opening=f"Task: {instance.instruction}",
        moments=moments,
        reward=reward,
        invalid=0,
    )


def write_episodes(folder: Path, episodes: Sequence[Collected]) -> Path:
    """A folder as `shoal dream collect` leaves it."""
    folder.mkdir(parents=True)
    (folder / "episodes.jsonl").write_bytes(b"".join(to_json(one) + b"\n" for one in episodes))
    return folder


def make_reader(directory: Path) -> Path:
    """A random byte-level Llama with room for a page."""
    sys.path.append(str(Path(__file__).parent / "engine"))
    from engine_cases import PLAIN, make_checkpoint

    return make_checkpoint(directory, PLAIN, max_position_embeddings=8192)
