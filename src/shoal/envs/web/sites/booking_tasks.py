"""What is asked of the booking desk."""

from __future__ import annotations

from random import Random

from shoal.envs.web.actions import Click, Select, Stop, Type
from shoal.envs.web.policy import Policy, between, nodes, one
from shoal.envs.web.sites.booking import NEWSLETTERS, PERSONS, SERVICES, SUBJECTS, Booking
from shoal.envs.web.sites.template import Params, Template
from shoal.envs.web.sites.words import TOWNS, people
from shoal.envs.web.tree import Page


class BookingTask(Template[Booking]):
    site = Booking

    def draw(self, site: Booking, rng: Random) -> Params:
        service = rng.choice(SERVICES)
        when = rng.choice(site.free(service)).when
        return {"service": service, "when": when, "day": when.partition(" ")[0], "name": people(rng, 1)[0]}


class PriceOfService(BookingTask):
    level = 1
    words = ("What is the price of {service}, in pounds?", "How many pounds is the {service}?")

    def answer(self, site: Booking, p: Params) -> str:
        return str(site.prices[p["service"]])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["service"]))
        yield Stop(between(page, "Price: £", "."))


class BookTime(BookingTask):
    level = 2
    words = ("Book {service} on {when} for {name}.", "{name} wants {service} on {when}: book it.")

    def do(self, site: Booking, p: Params) -> None:
        site.book(site.slot(p["service"], p["when"]), p["name"], "1", False)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["service"]))
        page = yield Click(one(page, "link", p["when"]))
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=False)
        yield Click(one(page, "button", "Book"))


class BookFirst(BookTime):
    words = (
        "Book the first free time of {service} for {name}.",
        "{service} for {name}, as early as possible: book it.",
    )

    def draw(self, site: Booking, rng: Random) -> Params:
        service = rng.choice(SERVICES)
        return {"service": service, "when": "", "name": people(rng, 1)[0]}

    def do(self, site: Booking, p: Params) -> None:
        site.book(site.free(p["service"])[0], p["name"], "1", False)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["service"]))
        page = yield Click(nodes(page, "link", where=lambda node: ":" in node.name)[0].id)
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=False)
        yield Click(one(page, "button", "Book"))


class BookGroup(BookingTask):
    level = 3
    words = (
        "Book {service} on {when} for {name}, {persons} persons, with a reminder.",
        "{service}, {when}: book it for {persons} persons, name {name}, and ask for a reminder.",
    )

    def draw(self, site: Booking, rng: Random) -> Params:
        return {**super().draw(site, rng), "persons": rng.choice(PERSONS[1:])}

    def do(self, site: Booking, p: Params) -> None:
        site.book(site.slot(p["service"], p["when"]), p["name"], p["persons"], True)

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["service"]))
        page = yield Click(one(page, "link", p["when"]))
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=False)
        page = yield Select(one(page, "combobox", "Persons"), p["persons"])
        page = yield Click(one(page, "checkbox", "Remind me"))
        yield Click(one(page, "button", "Book"))


class CancelBooking(BookingTask):
    level = 1
    words = ("Cancel your booking of {service}.", "You cannot make it to the {service}: cancel the booking.")

    def draw(self, site: Booking, rng: Random) -> Params:
        return {"service": rng.choice([slot.service for slot in site.slots if slot.mine])}

    def do(self, site: Booking, p: Params) -> None:
        site.cancel(site.mine(p["service"]))

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "My bookings"))
        page = yield Click(one(page, "link", where=lambda node: node.name.startswith(f"{p['service']}, ")))
        yield Click(one(page, "button", "Cancel booking"))


class MoveBooking(CancelBooking):
    level = 2
    words = ("Move your booking of {service} to {when}.", "Your {service} should be on {when} instead: move it.")

    def draw(self, site: Booking, rng: Random) -> Params:
        service = super().draw(site, rng)["service"]
        return {"service": service, "when": rng.choice(site.free(service)).when}

    def do(self, site: Booking, p: Params) -> None:
        site.move(site.mine(p["service"]), p["when"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "My bookings"))
        page = yield Click(one(page, "link", where=lambda node: node.name.startswith(f"{p['service']}, ")))
        times = page.find(one(page, "combobox", "New time"))
        if times is not None and times.value != p["when"]:
            page = yield Select(times.id, p["when"])
        yield Click(one(page, "button", "Move booking"))


class Contact(BookingTask):
    level = 1
    words = (
        'Send a message with the subject {subject}: "{text}"',
        'Use the contact form. Subject: {subject}. Message: "{text}"',
    )

    def draw(self, site: Booking, rng: Random) -> Params:
        return {"subject": rng.choice(SUBJECTS), "text": f"I come from {rng.choice(TOWNS)}"}

    def do(self, site: Booking, p: Params) -> None:
        site.write(p["subject"], p["text"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Contact"))
        if p["subject"] != SUBJECTS[0]:
            page = yield Select(one(page, "combobox", "Subject"), p["subject"])
        page = yield Type(one(page, "textbox", "Message"), p["text"], enter=False)
        yield Click(one(page, "button", "Send"))


class ChangePhone(BookingTask):
    level = 1
    words = ("Change your phone number to {phone}.", "Your new phone number is {phone}: put it into your profile.")

    def draw(self, site: Booking, rng: Random) -> Params:
        return {"phone": f"0{rng.randint(100, 999)} {rng.randint(1000, 9999)}"}

    def do(self, site: Booking, p: Params) -> None:
        site.phone = p["phone"]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Profile"))
        page = yield Type(one(page, "textbox", "Phone"), p["phone"], enter=False)
        yield Click(one(page, "button", "Save"))


class Newsletters(BookingTask):
    level = 2
    words = ("Get the newsletter {name} and no other.", "Of the newsletters, take {name} alone.")

    def draw(self, site: Booking, rng: Random) -> Params:
        return {"name": rng.choice([name for name in NEWSLETTERS if name not in site.newsletters])}

    def do(self, site: Booking, p: Params) -> None:
        site.newsletters = {p["name"]}

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Profile"))
        for name in NEWSLETTERS:
            box = page.find(one(page, "checkbox", name))
            if box is not None and ("checked" in box.states) != (name == p["name"]):
                page = yield Click(box.id)
        yield Click(one(page, "button", "Save"))


TEMPLATES = (
    PriceOfService(),
    CancelBooking(),
    Contact(),
    ChangePhone(),
    BookTime(),
    BookFirst(),
    MoveBooking(),
    Newsletters(),
    BookGroup(),
)
