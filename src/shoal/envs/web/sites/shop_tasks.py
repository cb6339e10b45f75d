"""What is asked of the shop."""

from __future__ import annotations

from random import Random

from shoal.envs.web.actions import Click, Select, Stop, Type
from shoal.envs.web.policy import Policy, between, one
from shoal.envs.web.sites.shop import DELIVERIES, THINGS, Shop
from shoal.envs.web.sites.template import Params, Template
from shoal.envs.web.sites.words import address, people
from shoal.envs.web.tree import Page


class ShopTask(Template[Shop]):
    site = Shop

    def draw(self, site: Shop, rng: Random) -> Params:
        product = rng.choice(site.stock.products)
        return {"item": product.name, "category": product.category, "count": rng.randint(2, 6)}


class PutOne(ShopTask):
    level = 1
    words = (
        "Put one {item} into the basket. It is in {category}.",
        "Add a {item} ({category}) to your basket.",
    )

    def do(self, site: Shop, p: Params) -> None:
        site.add(p["item"], 1)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        page = yield Click(one(page, "link", p["item"]))
        yield Click(one(page, "button", "Add to basket"))


class PriceOf(ShopTask):
    level = 1
    words = ("What does the {item} in {category} cost, in pounds?", "Tell me the price of the {item} ({category}).")

    def answer(self, site: Shop, p: Params) -> str:
        return str(site.product(p["item"]).price)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        page = yield Click(one(page, "link", p["item"]))
        yield Stop(between(page, "Price: £", "."))


class StarsOf(ShopTask):
    level = 1
    words = ("How many stars has the {item}? Look in {category}.", "{category}: how many stars does the {item} have?")

    def answer(self, site: Shop, p: Params) -> str:
        return str(site.product(p["item"]).stars)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        page = yield Click(one(page, "link", p["item"]))
        yield Stop(between(page, "Stars: ", " of"))


class PutSeveral(ShopTask):
    level = 2
    words = ("Put {count} of the {item} into the basket.", "I need {count} times the {item}: add them to the basket.")

    def do(self, site: Shop, p: Params) -> None:
        site.add(p["item"], p["count"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        page = yield Click(one(page, "link", p["item"]))
        page = yield Type(one(page, "textbox", "Quantity"), str(p["count"]), enter=False)
        yield Click(one(page, "button", "Add to basket"))


class FindAndWish(ShopTask):
    level = 2
    words = ("Search for the {item} and add it to your wishes.", "Find {item} by the search and put it on the wishes.")

    def do(self, site: Shop, p: Params) -> None:
        site.wish(p["item"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Search"), p["item"], enter=True)
        page = yield Click(one(page, "link", p["item"]))
        yield Click(one(page, "button", "Add to wishes"))


class PutCheapest(ShopTask):
    level = 2
    words = (
        "Put one of the cheapest product in {category} into the basket.",
        "Basket: the cheapest thing of {category}.",
    )

    def draw(self, site: Shop, rng: Random) -> Params:
        return {"category": rng.choice(list(THINGS))}

    def do(self, site: Shop, p: Params) -> None:
        site.add(min(site.in_category(p["category"]), key=lambda product: product.price).name, 1)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        prices, product = {}, ""
        for node in page.root.walk():
            if node.name.startswith("£"):
                prices[int(node.name[1:])] = product
            product = node.id
        page = yield Click(prices[min(prices)])
        yield Click(one(page, "button", "Add to basket"))


class RemoveFromBasket(ShopTask):
    level = 1
    words = ("Remove the {item} from the basket.", "I do not want the {item} any more: take it out of the basket.")

    def draw(self, site: Shop, rng: Random) -> Params:
        return {"item": rng.choice(list(site.stock.basket))}

    def do(self, site: Shop, p: Params) -> None:
        site.remove(p["item"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Basket"))
        yield Click(one(page, "button", f"Remove {p['item']}"))


class CheckOut(ShopTask):
    level = 3
    words = (
        "Order what is in the basket for {name}, {street}. Delivery: {delivery}.",
        "Check out the basket: {delivery} delivery to {name} at {street}.",
    )

    def draw(self, site: Shop, rng: Random) -> Params:
        return {"name": people(rng, 1)[0], "street": address(rng), "delivery": rng.choice(DELIVERIES)}

    def do(self, site: Shop, p: Params) -> None:
        site.order(p["name"], p["street"], p["delivery"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Basket"))
        page = yield Click(one(page, "link", "Check out"))
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=False)
        page = yield Type(one(page, "textbox", "Street"), p["street"], enter=False)
        if p["delivery"] != DELIVERIES[0]:
            page = yield Select(one(page, "combobox", "Delivery"), p["delivery"])
        yield Click(one(page, "button", "Place order"))


class AddAndOrder(CheckOut):
    words = (
        "Add one {item} from {category} to the basket, then order it all for {name}, {street}. Delivery: {delivery}.",
        "Put a {item} ({category}) into the basket and check out: {name}, {street}, {delivery} delivery.",
    )

    def draw(self, site: Shop, rng: Random) -> Params:
        product = rng.choice(site.stock.products)
        return {**super().draw(site, rng), "item": product.name, "category": product.category}

    def do(self, site: Shop, p: Params) -> None:
        site.add(p["item"], 1)
        super().do(site, p)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["category"]))
        page = yield Click(one(page, "link", p["item"]))
        page = yield Click(one(page, "button", "Add to basket"))
        yield from super().solve(page, p)


class CancelOrder(ShopTask):
    level = 2
    words = ("Cancel the order of {name}.", "{name} has changed their mind: cancel their order.")

    def draw(self, site: Shop, rng: Random) -> Params:
        return {"name": rng.choice(site.stock.orders).name}

    def do(self, site: Shop, p: Params) -> None:
        site.cancel(next(n for n, order in enumerate(site.stock.orders) if order.name == p["name"]))

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Orders"))
        page = yield Click(one(page, "link", where=lambda node: node.name.endswith(f" of {p['name']}")))
        yield Click(one(page, "button", "Cancel order"))


TEMPLATES = (
    PutOne(),
    PriceOf(),
    StarsOf(),
    RemoveFromBasket(),
    PutSeveral(),
    FindAndWish(),
    PutCheapest(),
    CancelOrder(),
    CheckOut(),
    AddAndOrder(),
)
