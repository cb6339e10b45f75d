"""Pages: whatever others have written stays text, and charts are well-formed whatever the numbers are."""

from __future__ import annotations

import math
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from console_cases import PAGE, Page, agent_events, make_run, write_log
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_console_memories import remember

from shoal.protocol.status import NodeStatus, NodeView, RunStatus, Wait
from shoal.serving.console.agents import AgentLog
from shoal.serving.console.app import RENDERS
from shoal.serving.console.asked import Coordinator, Server
from shoal.serving.console.charts import Curve, bars, lines, network, stripe
from shoal.serving.console.frame import login_page, page
from shoal.serving.console.house import House, Watched
from shoal.serving.console.html import amount, seconds, short
from shoal.serving.console.memories import Memories
from shoal.serving.console.runs import RunFolder
from shoal.serving.console.views.episodes import acted, observed
from shoal.serving.console.voices import Voices

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></section><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "javascript:alert(1)",
    "<svg/onload=alert(1)>",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }} ${7*7}",
    "\u202egnp.exe",
]
MARKS = dict.fromkeys(("console.css", "console.js", "icon.svg"), "0")
FINITE_OR_NOT = st.floats(allow_nan=True, allow_infinity=True)


def status_of(text: str) -> RunStatus:
    """A run whose nodes call themselves `text`."""
    wait = Wait(what=f"a lease {text}", whom="bb", seconds=9.0, overdue=True)
    own = NodeStatus(
        node_id="aa", name=text, role="worker", software="1", protocol_version=1, pid=1, host=text, now=1.0, up_s=1.0,
        doing=text, waits=(wait,),
    )  # fmt: skip
    node = NodeView(
        node_id="aa", name=text, role="worker", state="parked", why=text, device=text, delays={"cc": 0.03, "bb": 0.1},
        status=own, price_usd_per_hour=0.5,
    )  # fmt: skip
    other = NodeView(node_id="bb", name="cellar", role="learner", state="active")
    own = NodeStatus(
        node_id="cc", name="c", role="coordinator", software="1", protocol_version=1, pid=1, host="h", now=1.0,
        up_s=1.0, doing="leads",
    )  # fmt: skip
    return RunStatus(
        run=text, step=3, steps=8, published=3, max_staleness=2, most_stale=1, groups={text: 3}, usd_per_hour=0.5,
        coordinator=own, nodes=(node, other), silent=(text,), metrics={f"capacity/{text}": 1.0, "usd": 2.5},
        mode="async",
    )  # fmt: skip


def house_of(folder: Path, text: str) -> tuple[House, str]:
    """Everything at once, `text` wherever it can be; and the id of a memory."""
    run = make_run(folder / "run", text=text)
    write_log(folder / "runs.db", agent_events("one", text))
    (entry,) = remember(folder, f"Note {text}")
    coordinator = Coordinator(lambda: pytest.fail("nobody asks"), status_of(text))
    server = Server("http://x", models=(text,), counters={"shoal_policy_version": 3.0})
    house = House(
        [Watched("run", RunFolder(run), coordinator)],
        agents=AgentLog(folder / "runs.db"),
        memories=Memories(folder),
        server=server,
        voices=Voices({"run": run}, server, drafters=("ngram",)),
    )
    house.read_on()
    return house, entry


def pages_of(house: House, entry: str, text: str) -> dict[str, str]:
    """Every view as a whole page, its details open."""
    found = {}
    for view, render in RENDERS.items():
        for query in (
            {},
            {"episode": "1"},
            {"episode": "0"},
            {"entry": entry},
            {"q": text},
            {"run": text, "step": "9"},
        ):
            parts = render(house, query)
            found[f"{view} {query}"] = page(
                view, parts, marks=MARKS, nonce="n", theme="", token="t", last="0-0", query=query, runs=["run", text],
                keyed=True,
            )  # fmt: skip
    return found


@settings(max_examples=2)
@given(st.text(max_size=40))
@example(HOSTILE[0] + HOSTILE[1] + HOSTILE[2])
@example("".join(HOSTILE[3:]))
def test_what_others_wrote_stays_text(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        usable = text.replace("\ud800", "").encode("utf-8", "ignore").decode() or "x"
        house, entry = house_of(Path(folder), usable)
        for where, html in pages_of(house, entry, usable).items():
            found = Page(html)
            assert not found.wrong, where
            assert found.elements.count("script") == 1, where
        house._close()


def test_every_view_says_what_it_knows(tmp_path: Path) -> None:
    house, entry = house_of(tmp_path, "Zaphod")
    wanted = {
        "overview {}": ("reward", "0.8", "from 0.0%", "40.0%", "2.50 $", "0.50 $ an hour", "attic"),
        "run {}": ("Mismatch", "bound S = 2", "from learnerZaphod", "4.0 kB", "process.died", "max_staleness = 2"),
        "swarm {}": ("parked", "Zaphod", "30 ms", "100 ms", "coordinator", "overdue", "a lease Zaphod"),
        "agents {}": ("add things Zaphod", "tries repeated", "2 tries", "timeout Zaphod", "✗ c2"),
        "memory {}": ("Note Zaphod", "active", "shop", "manual"),
        f"memory {{'entry': '{entry}'}}": ("No trial has been kept", "does not hold", "it helps", "decided"),
        "episodes {}": ("Episodes of step 7", "cart-0", "What is 1 + 1?"),
        "episodes {'episode': '1'}": ("textbox", "Quantity", "= 2", "focused", "✓ strict", "✗ paid", '"a": 1'),
        "episodes {'q': 'Zaphod'}": ("Episodes with “Zaphod”",),
        "playground {}": ("served/Zaphod", "drafts: ngram", "temperature"),
    }
    pages = pages_of(house, entry, "Zaphod")
    for where, words in wanted.items():
        shown = Page(pages[where]).words
        for word in words:
            assert word in shown, (where, word)
    house._close()


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    house = House()
    for view, render in RENDERS.items():
        assert len(Page(render(house, {})).words) > 20, view
    empty = House([Watched("run", RunFolder(tmp_path))], agents=AgentLog(tmp_path / "a"), memories=Memories(tmp_path))
    empty.read_on()
    for render in RENDERS.values():
        assert not Page(render(empty, {"agent": "x", "entry": "y", "episode": "1"})).wrong


def test_a_page_is_shown_as_a_tree() -> None:
    html = observed(f"You clicked.\n{PAGE}", "t")
    root = ElementTree.fromstring(html)
    inner = root.find(".//details//details")
    assert inner is not None
    assert "Quantity" in "".join(inner.itertext())
    assert "Home" not in "".join(inner.itertext())
    assert "You clicked." in Page(html).words
    assert "3 lines below" in Page(html).words
    assert observed("The URL: is no page", "t").startswith("<pre")
    assert acted("{broken").startswith("<pre")


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.tuples(FINITE_OR_NOT, FINITE_OR_NOT), max_size=8), max_size=4),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_charts_are_well_formed(curves: list[list[tuple[float, float]]], bound: float | None) -> None:
    shown = [Curve("<a>", tuple(sorted(p for p in points if math.isfinite(p[0])))) for points in curves]
    made = [lines("<t>", shown, bound=bound, bound_name="&"), lines("t", shown, zero=False)]
    made.append(bars("<b>", [(f"<{y}>", y) for points in curves for _, y in points]))
    made.append(stripe([(0.0, 0.5, "span works", "<w>"), (0.5, 0.5, "span fails", "&")]))
    for html in made:
        for element in ElementTree.fromstring(html).iter():
            for key, value in element.attrib.items():
                assert key != "style"
                assert "nan" not in value.split() and "inf" not in value.split(), (key, value)


@settings(max_examples=30)
@given(st.integers(0, 30), st.booleans())
def test_networks_are_well_formed(count: int, has_middle: bool) -> None:
    nodes = [(f"<{n}>", "active") for n in range(count)]
    edges = [(n, (n + 1) % count, "3 ms", 0.5) for n in range(count)] if count else []
    root = ElementTree.fromstring(network(nodes, edges, 0 if has_middle and count else None))
    assert len(root.findall(".//circle")) == count


def test_the_log_in_page_is_clean() -> None:
    assert not Page(login_page(MARKS, "n", "dark", wrong=True)).wrong


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1234567, "1.23 M"), (0.5, "0.5"), (0.123456, "0.123"), (12.345, "12.35"), (1e-9, "1e-09"),
     (math.nan, "–"), (-3, "-3"), (1234, "1,234"), (2.5e13, "25 T")],
)  # fmt: skip
def test_numbers_are_written_as_people_do(value: float, words: str) -> None:
    assert amount(value) == words


def test_times_and_texts() -> None:
    assert [seconds(v) for v in (2e-5, 0.03, 2.0, 300, 9000, 1e6, math.inf)] == [
        "20 µs", "30 ms", "2.0 s", "5 min", "2.5 h", "12 days", "–",
    ]  # fmt: skip
    assert short("a\n  b " * 100, 9) == "a b a b …"
