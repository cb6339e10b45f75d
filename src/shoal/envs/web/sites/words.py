"""The names that sites are filled with."""

from __future__ import annotations

from random import Random

from shoal.envs.web.listed import listed

FIRST = listed("""Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Nils Olga Pia Rolf Sara Tom Vera""")
LAST = listed("""Abbot Baker Cole Dunn Ellis Frost Gray Holt Irwin Jones Kemp Lowe Moss Nash Owens Price Reed Stone""")
STREETS = ["Mill Lane", "High Street", "Park Road", "Hill Close", "Lake Drive", "Church Walk"]
TOWNS = listed("""Ashford Brunton Calder Dunmore Elmsby Farrow Glenby Hartle Ivybank Kelso Larkhill Melton""")
COLOURS = ["Black", "Blue", "Brown", "Green", "Grey", "Red", "White", "Yellow"]
TOPICS = listed("""boots bread bees chess clay ferns kites lenses maps moths opera pears rafts snow tides wool""")


def people(rng: Random, count: int) -> list[str]:
    """Different full names; no two share the first one."""
    return [f"{first} {rng.choice(LAST)}" for first in rng.sample(FIRST, count)]


def email(name: str) -> str:
    return f"{name.lower().replace(' ', '.')}@mail.test"


def address(rng: Random) -> str:
    return f"{rng.randint(1, 99)} {rng.choice(STREETS)}"
