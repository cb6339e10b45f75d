"""A booking desk: services with free times, your bookings, a contact form, a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from shoal.envs.web.sites.site import (
    Form,
    Refused,
    Site,
    area,
    choice,
    field,
    form,
    lines,
    link,
    pick,
    slug,
    text,
    tick,
)
from shoal.envs.web.sites.words import email, people

SERVICES = ("Haircut", "Massage", "Piano lesson", "Eye test", "Bike repair")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TIMES = ("09:00", "10:30", "13:00", "14:30", "16:00")
SUBJECTS = ("Question", "Complaint", "Praise")
NEWSLETTERS = ("Offers", "News", "Tips")
PERSONS = ("1", "2", "3", "4")


@dataclass
class Slot:
    service: str
    day: str
    time: str
    name: str = ""
    """Who has it; empty while it is free."""
    persons: str = "1"
    reminder: bool = False
    mine: bool = False

    @property
    def when(self) -> str:
        return f"{self.day} {self.time}"


class Booking(Site):
    host = "booking.test"
    title = "Booking Desk"
    personal = True
    menu = {"/": "Services", "/mine": "My bookings", "/contact": "Contact", "/profile": "Profile"}

    def fill(self, rng: Random, content: Random) -> None:
        self.prices = dict(zip(SERVICES, content.sample(range(15, 95), len(SERVICES)), strict=True))
        self.slots: list[Slot] = []
        mine = rng.sample(SERVICES, 2)
        for service in SERVICES:
            times = sorted(
                (DAYS.index(day), time) for day in content.sample(DAYS, 3) for time in content.sample(TIMES, 2)
            )
            slots = [Slot(service, DAYS[day], time) for day, time in times]
            if service in mine:
                taken = rng.choice(slots)
                taken.name, taken.mine = people(rng, 1)[0], True
            self.slots += slots
        self.phone = f"0{rng.randint(100, 999)} {rng.randint(1000, 9999)}"
        self.mail = email(people(rng, 1)[0])
        self.newsletters = {rng.choice(NEWSLETTERS)}
        self.messages: list[tuple[str, str]] = []

    def state(self) -> Any:
        return [asdict(slot) for slot in self.slots], self.phone, self.mail, self.newsletters, self.messages

    def free(self, service: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.service == service and not slot.name]

    def slot(self, service: str, when: str) -> Slot:
        return next(slot for slot in self.slots if slot.service == service and slot.when == when)

    def mine(self, service: str) -> Slot:
        return next(slot for slot in self.slots if slot.service == service and slot.mine)

    def book(self, slot: Slot, name: str, persons: str, reminder: bool) -> None:
        if slot.name:
            raise Refused("This time is taken.")
        if not name or persons not in PERSONS:
            raise Refused("A name and a number of persons are needed.")
        slot.name, slot.persons, slot.reminder, slot.mine = name, persons, reminder, True

    def cancel(self, slot: Slot) -> None:
        if not slot.mine:
            raise Refused("This is no booking of yours.")
        slot.name, slot.persons, slot.reminder, slot.mine = "", "1", False, False

    def move(self, slot: Slot, when: str) -> None:
        onto = next((one for one in self.free(slot.service) if one.when == when), None)
        if onto is None or not slot.mine:
            raise Refused("It cannot be moved there.")
        name, persons, reminder = slot.name, slot.persons, slot.reminder
        self.cancel(slot)
        self.book(onto, name, persons, reminder)

    def write(self, subject: str, words: str) -> None:
        if subject not in SUBJECTS or not words:
            raise Refused("A message needs a subject and some text.")
        self.messages.append((subject, words))

    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        match path:
            case []:
                return self.title, lines(link(f"/service/{slug(name)}", name) for name in SERVICES)
            case ["service", name]:
                service = next((one for one in SERVICES if slug(one) == name), None)
                return None if service is None else (service, self._times(service))
            case ["book", number]:
                slot = pick(self.slots, number)
                if slot is None or slot.name:
                    return None
                fields = (field("Name", "name"), choice("Persons", "persons", PERSONS), tick("Remind me", "reminder"))
                return f"{slot.service}, {slot.when}", form(f"/book/{number}", *fields, button="Book")
            case ["mine"]:
                return "My bookings", lines(
                    link(f"/mine/{number}", f"{slot.service}, {slot.when}")
                    for number, slot in enumerate(self.slots)
                    if slot.mine
                ) or text("You have no bookings.")
            case ["mine", number]:
                slot = pick(self.slots, number)
                return (
                    None if slot is None or not slot.mine else (f"{slot.service}, {slot.when}", self._own(slot, number))
                )
            case ["contact"]:
                subject = choice("Subject", "subject", SUBJECTS)
                return "Contact", form("/contact", subject, area("Message", "text"), button="Send")
            case ["sent"]:
                return "Thank you", text("Your message was sent.")
            case ["profile"]:
                reached = field("Phone", "phone", self.phone) + field("Email", "mail", self.mail)
                ticks = [tick(name, name, name in self.newsletters) for name in NEWSLETTERS]
                return "Profile", form("/profile", reached, text("Newsletters:"), *ticks, button="Save")
        return None

    def _times(self, service: str) -> str:
        links = (
            link(f"/book/{number}", slot.when)
            for number, slot in enumerate(self.slots)
            if slot.service == service and not slot.name
        )
        return text(f"Price: £{self.prices[service]}. Free times:") + lines(links)

    def _own(self, slot: Slot, number: str) -> str:
        times = [one.when for one in self.free(slot.service)]
        return (
            text(f"For {slot.name}, persons: {slot.persons}.")
            + form(f"/mine/{number}/move", choice("New time", "when", times), button="Move booking")
            + form(f"/mine/{number}/cancel", button="Cancel booking")
        )

    def submit(self, path: Sequence[str], form: Form) -> str | None:
        match path:
            case ["book", number]:
                slot = pick(self.slots, number)
                if slot is None:
                    return None
                self.book(slot, form.get("name", ""), form.get("persons", ""), "reminder" in form)
                return "/mine"
            case ["mine", number, "move" | "cancel" as act]:
                slot = pick(self.slots, number)
                if slot is None:
                    return None
                if act == "cancel":
                    self.cancel(slot)
                else:
                    self.move(slot, form.get("when", ""))
                return "/mine"
            case ["contact"]:
                self.write(form.get("subject", ""), form.get("text", ""))
                return "/sent"
            case ["profile"]:
                self.phone, self.mail = form.get("phone", self.phone), form.get("mail", self.mail)
                self.newsletters = {name for name in NEWSLETTERS if name in form}
                return "/profile"
        return None
