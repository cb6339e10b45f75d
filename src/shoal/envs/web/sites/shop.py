"""A shop: categories, products, a basket, wishes, orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from random import Random
from typing import Any

from shoal.envs.web.sites.site import Form, Refused, Site, choice, field, form, hidden, lines, link, pick, slug, text
from shoal.envs.web.sites.words import COLOURS, address, people

THINGS = {
    "Kitchen": ["Kettle", "Toaster", "Pan", "Bowl", "Mug"],
    "Garden": ["Spade", "Rake", "Hose", "Bucket", "Lamp"],
    "Office": ["Stapler", "Folder", "Pen", "Desk", "Chair"],
}
DELIVERIES = ("Standard", "Express", "Collect")
PRODUCTS_PER_CATEGORY = 5


@dataclass(frozen=True)
class Product:
    name: str
    category: str
    price: int
    stars: int
    """1 to 5."""


@dataclass(frozen=True)
class Order:
    items: tuple[tuple[str, int], ...]
    name: str
    street: str
    delivery: str
    cancelled: bool = False


@dataclass
class Stock:
    products: list[Product] = default(default_factory=list)
    basket: dict[str, int] = default(default_factory=dict)
    wishes: set[str] = default(default_factory=set)
    orders: list[Order] = default(default_factory=list)


class Shop(Site):
    host = "shop.test"
    title = "Corner Shop"
    personal = True
    menu = {"/": "Home", "/basket": "Basket", "/wishes": "Wishes", "/orders": "Orders"}

    def fill(self, rng: Random, content: Random) -> None:
        self.stock = Stock()
        for category, things in THINGS.items():
            # Prices and stars differ within a category, so that there is one cheapest and one best.
            prices = content.sample(range(3, 90), PRODUCTS_PER_CATEGORY)
            for thing, price in zip(things, prices, strict=True):
                name = f"{content.choice(COLOURS)} {thing}"
                self.stock.products.append(Product(name, category, price, content.randint(1, 5)))
        names = [product.name for product in self.stock.products]
        for name in rng.sample(names, 2):
            self.stock.basket[name] = rng.randint(1, 3)
        for customer in people(rng, 3):
            items = tuple((name, 1) for name in rng.sample(names, 1))
            self.stock.orders.append(Order(items, customer, address(rng), rng.choice(DELIVERIES)))

    def state(self) -> Any:
        return self.stock.basket, self.stock.wishes, self.stock.orders

    def product(self, name: str) -> Product:
        return next(one for one in self.stock.products if one.name == name)

    def in_category(self, category: str) -> list[Product]:
        return [one for one in self.stock.products if one.category == category]

    def add(self, name: str, count: int) -> None:
        if not 1 <= count <= 20:
            raise Refused("The quantity must be from 1 to 20.")
        self.stock.basket[name] = self.stock.basket.get(name, 0) + count

    def remove(self, name: str) -> None:
        self.stock.basket.pop(name, None)

    def wish(self, name: str) -> None:
        self.stock.wishes.add(name)

    def order(self, name: str, street: str, delivery: str) -> None:
        if not name or not street or delivery not in DELIVERIES:
            raise Refused("Name, street and delivery are needed.")
        if not self.stock.basket:
            raise Refused("The basket is empty.")
        self.stock.orders.append(Order(tuple(sorted(self.stock.basket.items())), name, street, delivery))
        self.stock.basket = {}

    def cancel(self, number: int) -> None:
        old = self.stock.orders[number]
        self.stock.orders[number] = Order(old.items, old.name, old.street, old.delivery, cancelled=True)

    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        stock = self.stock
        match path:
            case []:
                search = form("/search", field("Search", "q"), button="Find", method="get")
                return self.title, search + lines(link(f"/category/{slug(name)}", name) for name in THINGS)
            case ["category", name]:
                found = [one for one in stock.products if slug(one.category) == name]
                return (found[0].category, self._listed(found)) if found else None
            case ["search"]:
                asked = query.get("q", "").casefold()
                found = [one for one in stock.products if asked and asked in one.name.casefold()]
                return "Search", self._listed(found) if found else text("Nothing was found.")
            case ["product", number]:
                product = pick(stock.products, number)
                return None if product is None else (product.name, self._details(product, number))
            case ["basket"]:
                rows = [
                    text(f"{count} × {name}") + form("/basket/remove", hidden("name", name), button=f"Remove {name}")
                    for name, count in stock.basket.items()
                ]
                onward = link("/checkout", "Check out") if stock.basket else text("It is empty.")
                return "Basket", lines(rows) + onward
            case ["checkout"]:
                fields = (field("Name", "name"), field("Street", "street"), choice("Delivery", "delivery", DELIVERIES))
                return "Check out", form("/checkout", *fields, button="Place order")
            case ["wishes"]:
                return "Wishes", lines(text(name) for name in sorted(stock.wishes)) or text("There are none.")
            case ["orders"]:
                return "Orders", lines(
                    link(f"/orders/{number}", f"Order {number + 1} of {order.name}")
                    for number, order in enumerate(stock.orders)
                )
            case ["orders", number]:
                order = pick(stock.orders, number)
                return None if order is None else (f"Order {int(number) + 1}", self._order(order, number))
        return None

    def _listed(self, products: list[Product]) -> str:
        numbers = {product.name: number for number, product in enumerate(self.stock.products)}
        return lines(link(f"/product/{numbers[one.name]}", one.name) + f" £{one.price}" for one in products)

    def _details(self, product: Product, number: str) -> str:
        return (
            text(f"Price: £{product.price}. Stars: {product.stars} of 5.")
            + form(f"/product/{number}/add", field("Quantity", "count", "1"), button="Add to basket")
            + form(f"/product/{number}/wish", button="Add to wishes")
        )

    def _order(self, order: Order, number: str) -> str:
        items = ", ".join(f"{count} × {name}" for name, count in order.items)
        about = text(f"{items} for {order.name}, {order.street}. Delivery: {order.delivery}.")
        if order.cancelled:
            return about + text("This order is cancelled.")
        return about + form(f"/orders/{number}/cancel", button="Cancel order")

    def submit(self, path: Sequence[str], form: Form) -> str | None:
        match path:
            case ["product", number, "add" | "wish" as act]:
                product = pick(self.stock.products, number)
                if product is None:
                    return None
                if act == "wish":
                    self.wish(product.name)
                    return "/wishes"
                count = form.get("count", "")
                self.add(product.name, int(count) if count.isdecimal() and len(count) < 4 else 0)
                return "/basket"
            case ["basket", "remove"]:
                self.remove(form.get("name", ""))
                return "/basket"
            case ["checkout"]:
                self.order(form.get("name", ""), form.get("street", ""), form.get("delivery", ""))
                return f"/orders/{len(self.stock.orders) - 1}"
            case ["orders", number, "cancel"]:
                if pick(self.stock.orders, number) is None:
                    return None
                self.cancel(int(number))
                return f"/orders/{number}"
        return None
