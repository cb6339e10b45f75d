"""Sixty questions shaped like GAIA's, over files made here, each with a solver.

Six kinds, ten questions each (seeds 0 to 9): totals over web pages, comparisons of texts, facts found over several
documents, counts in a long file, statistics of a table, facts found by searching. Each kind has a solver: a generator
that yields the calls that it could make now, is sent their values, and returns the answer; and what a supervisor that
has read everything would work out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Wanted = tuple[str, dict[str, Any]]
Solver = Generator[list[Wanted], list[Any], str]
Minion = Callable[[dict[str, str]], str]
"""What the supervisor works out from all texts."""

NAMES = ("Aster", "Briar", "Cedar", "Dahlia", "Elder", "Fern", "Gorse", "Hazel")
PEOPLE = ("Ida Lund", "Jo Park", "Kai Moss", "Lea Roth", "Max Bohm", "Nia Cole")


@dataclass(frozen=True)
class Question:
    """A question, its answer, who solves it, and what a supervisor would work out from everything."""

    kind: str
    text: str
    answer: str
    solve: Callable[[], Solver]
    minion: Minion


def read(name: str, chunk: int = 0) -> Wanted:
    return "documents.read_document", {"document": name, "chunk": chunk}


def calculate(expression: str) -> Wanted:
    return "calculator.calculate", {"expression": expression}


def first_number(text: str, after: str) -> int:
    found = re.search(re.escape(after) + r"\D*([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else 0


def totals(folder: Path, draw: random.Random) -> Question:
    firms = draw.sample(NAMES, 5)
    values = {firm: draw.randint(1_000, 99_999) for firm in firms}
    for firm, value in values.items():
        rows = "".join(f"<tr><td>{year}</td><td>{draw.randint(1, 999):,}</td></tr>" for year in range(2020, 2025))
        page = f"<html><body><h1>{firm}</h1><table>{rows}<tr><td>2025</td><td>{value:,}</td></tr></table></body></html>"
        (folder / f"{firm}.html").write_text(page)

    def solve() -> Solver:
        pages = yield [read(f"{firm}.html") for firm in firms]
        (total,) = yield [calculate(" + ".join(str(first_number(page["text"], "2025")) for page in pages))]
        return str(total)

    text = f"What did {', '.join(firms)} earn in 2025 together?"
    names = [f"{firm}.html" for firm in firms]
    return Question(
        "totals",
        text,
        str(sum(values.values())),
        solve,
        lambda texts: str(sum(first_number(texts[name], "2025") for name in names)),
    )


def compared(folder: Path, draw: random.Random) -> Question:
    rivers = draw.sample(NAMES, 6)
    lengths = dict(zip(rivers, draw.sample(range(100, 999), 6), strict=True))
    for river, length in lengths.items():
        (folder / f"{river}.md").write_text(f"# {river}\n\nThe {river} is a river. Its length is {length} km.\n")

    def longest(texts: dict[str, str]) -> str:
        return max(rivers, key=lambda river: first_number(texts[f"{river}.md"], "length is"))

    def solve() -> Solver:
        found = yield [read(f"{river}.md") for river in rivers]
        return longest({one["document"]: one["text"] for one in found})

    text = f"Which is the longest of the rivers {', '.join(rivers)}?"
    return Question("compared", text, max(lengths, key=lengths.__getitem__), solve, longest)


def hops(folder: Path, draw: random.Random) -> Question:
    projects, teams = draw.sample(NAMES, 3), draw.sample(NAMES, 3)
    leads = draw.sample(PEOPLE, 3)
    for project, team, lead in zip(projects, teams, leads, strict=True):
        (folder / f"project {project}.md").write_text(f"Project {project} is owned by team {team}.\n")
        (folder / f"team {team}.txt").write_text(f"Team {team}.\nLead: {lead}\n")

    def follow(texts: dict[str, str]) -> str:
        team = re.search(r"by team (\w+)", texts[f"project {projects[0]}.md"])
        lead = re.search(r"Lead: (.+)", texts[f"team {team[1]}.txt"]) if team else None
        return lead[1] if lead else "unknown"

    def solve() -> Solver:
        (project,) = yield [read(f"project {projects[0]}.md")]
        team = re.search(r"by team (\w+)", project["text"])
        (page,) = yield [read(f"team {team[1]}.txt" if team else "")]
        return follow({project["document"]: project["text"], page["document"]: page["text"]})

    return Question("hops", f"Who leads the team that owns project {projects[0]}?", leads[0], solve, follow)


def counts(folder: Path, draw: random.Random) -> Question:
    lines = [f"{n:05} {draw.choice(['INFO', 'INFO', 'WARN', 'ERROR'])} job {draw.randint(1, 99)}" for n in range(1500)]
    (folder / "server.txt").write_text("\n".join(lines))
    count = sum(" ERROR " in line for line in lines)

    def solve() -> Solver:
        (first,) = yield [read("server.txt")]
        rest = yield [read("server.txt", number) for number in range(1, first["chunks"])]
        per_chunk = [chunk["text"].count(" ERROR ") for chunk in [first, *rest]]
        (total,) = yield [calculate(" + ".join(map(str, per_chunk)))]
        return str(total)

    text = "How many lines of server.txt report an ERROR?"
    return Question("counts", text, str(count), solve, lambda texts: str(texts["server.txt"].count(" ERROR ")))


def statistics(folder: Path, draw: random.Random) -> Question:
    columns = {name: [draw.randint(0, 999) for _ in range(60)] for name in ("north", "south")}
    rows = "\n".join(f"{n},{a},{b}" for n, (a, b) in enumerate(zip(*columns.values(), strict=True)))
    (folder / "table.csv").write_text(f"day,north,south\n{rows}\n")
    answer = str(max(columns["north"]) - min(columns["south"]))

    def spread(text: str) -> str:
        table = [line.split(",") for line in text.strip().split("\n")[1:]]
        return str(max(int(row[1]) for row in table) - min(int(row[2]) for row in table))

    def solve() -> Solver:
        (table,) = yield [read("table.csv")]
        program = (
            f"rows = [line.split(',') for line in {table['text']!r}.strip().split('\\n')[1:]]\n"
            "print(max(int(r[1]) for r in rows) - min(int(r[2]) for r in rows))"
        )
        (ran,) = yield [("python.run_python", {"program": program})]
        return str(ran["stdout"].strip())

    text = "In table.csv, by how much is the largest value of north above the smallest of south?"
    return Question("statistics", text, answer, solve, lambda texts: spread(texts["table.csv"]))


def searched(folder: Path, draw: random.Random) -> Question:
    animals = draw.sample(NAMES, 6)
    weights = {animal: draw.randint(10, 999) for animal in animals}
    for animal, weight in weights.items():
        (folder / f"note {draw.randint(1000, 9999)} {animal[:1]}.md").write_text(
            f"Field notes. The {animal} lizard was seen twice.\nA grown {animal} lizard weighs {weight} grams.\n"
        )
    wanted = animals[:4]

    def solve() -> Solver:
        found = yield [
            ("corpus.search", {"query": f"how many grams weighs the {one} lizard", "count": 1}) for one in wanted
        ]
        numbers = [
            first_number(hits[0]["text"], f"{one} lizard weighs") for one, hits in zip(wanted, found, strict=True)
        ]
        (total,) = yield [calculate(" + ".join(map(str, numbers)))]
        return str(total)

    def add_up(texts: dict[str, str]) -> str:
        everything = "\n".join(texts.values())
        return str(sum(first_number(everything, f"{one} lizard weighs") for one in wanted))

    text = f"What do one {', one '.join(wanted)} lizard weigh together, in grams?"
    return Question("searched", text, str(sum(weights[one] for one in wanted)), solve, add_up)


Kind = Callable[[Path, random.Random], Question]

SERVED: dict[Kind, tuple[str, ...]] = {
    totals: ("documents", "calculator"),
    compared: ("documents",),
    hops: ("documents",),
    counts: ("documents", "calculator"),
    statistics: ("documents", "python"),
    searched: ("documents", "corpus", "calculator"),
}
"""The kinds of questions, and the servers that each needs."""


def make(folder: Path, kind: Kind, seed: int) -> Question:
    """A question with its files, among others that have nothing to do with it."""
    draw = random.Random(f"{kind.__name__} {seed}")
    folder.mkdir(parents=True)
    for number in range(6):
        words = " ".join(draw.choice(("stone", "lake", "paper", "winter", "road", "glass")) for _ in range(200))
        (folder / f"other {number}.txt").write_text(words)
    return kind(folder, draw)
