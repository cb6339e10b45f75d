"""Runs, logs and stores as they lie on a disk, and a reader of pages that knows what may stand in one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.records import RunEvent
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion

CONFIG = """
[run]
steps = 8

[learner]
mode = "async"
max_staleness = 2
"""

ELEMENTS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "link",
        "script",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "article",
        "dialog",
    ),
    *(
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "span",
        "b",
        "code",
        "small",
        "kbd",
        "pre",
        "a",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
    ),
    *("form", "input", "button", "select", "option", "textarea", "label", "details", "summary", "figure", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "g", "line", "text", "polyline", "polygon", "circle", "rect"),
}

PAGE = """URL: http://shop.test/cart
RootWebArea 'Your cart'
\t[14] link 'Home'
\tmain ''
\t\t[21] textbox 'Quantity', value='2', focused
\t\tStaticText 'Total: 30'
(3 lines below: scroll [down])"""


def step(number: int, **more: Any) -> dict[str, Any]:
    """A line of metrics."""
    return {
        "time": 1000.0 + number,
        "kind": "step",
        "step": number,
        "reward": number / 10,
        "mismatch_kl": 0.003,
        "staleness_mean": 1.0,
        "staleness_max": 2.0,
        "utilisation": 0.9,
        "train_s": 2.0,
        "wait_s": 0.5,
        "staleness/1": 3,
        "staleness/2": 1,
        "rollouts/attic": 3,
        "rollouts/cellar": 1,
        **more,
    }


def event(kind: str, node: str = "", time: float = 1000.0, **data: Any) -> dict[str, Any]:
    return {"time": time, "node": node, "kind": kind, "data": data}


def write_lines(path: Path, lines: Iterable[dict[str, Any]], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def episode(index: int, observation: str, said: str, **more: Any) -> Episode:
    """One of one turn."""
    completion = Completion(
        token_ids=(1, 2), logprobs=(-0.5, -0.25), versions=(3, 3), finish="stop", text=said
    )  # fmt: skip
    return Episode(
        id=f"g1/{index}",
        group="g1",
        index=index,
        task=Task(env="shop", id=f"cart-{index}", seed=index),
        turns=(Turn(context_ids=(5, 6, 7), observation=observation, completion=completion),),
        outcome="done",
        **{"reward": 1.0, "reward_parts": {"strict": 1.0, "paid": 0.0, "speed": 0.5}, "worker": "attic", **more},
    )


def make_run(path: Path, *, text: str = "", episodes: Iterable[Episode] = ()) -> Path:
    """A run's folder, `text` wherever somebody else could have put it."""
    (path / "episodes").mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG)
    evals = [{"time": 1000.0, "kind": "eval", "version": v, "strict": v / 20, "lenient": v / 10, "questions": 40}
             for v in (0, 8)]  # fmt: skip
    write_lines(
        path / "metrics.jsonl", [evals[0], *(step(n, **{f"rollouts/{text}": 1}) for n in range(1, 9)), evals[1]]
    )
    write_lines(
        path / "events.jsonl",
        [
            event("run.started", steps=8),
            event("node.joined", "aa" * 8, name=f"attic{text}", role="worker"),
            event("snapshot.arrived", "aa" * 8, name=f"attic{text}", version=3, seconds=0.5,
                  by_source={f"learner{text}": 4000, "cellar": 1000}),
            event("worker.parked", "bb" * 8, name="cellar", reason=text),
            event("process.died", f"node{text}"[:200], exit_code=1, why=text),
        ],
    )  # fmt: skip
    made = list(episodes) or [
        episode(0, f"What is 1 + 1? {text}", f"2 {text}"),
        episode(1, f"{PAGE}\n{text}", '{"a": 1}'),
    ]
    (path / "episodes" / "000007.jsonl").write_bytes(b"".join(to_json(one) + b"\n" for one in made))
    return path


def agent_events(run: str, text: str = "") -> list[RunEvent]:
    """A run of two calls, the first of which is tried twice."""
    said: list[tuple[str, dict[str, Any]]] = [
        ("run", {"request": {"task": f"add things {text}"}, "history": []}),
        ("thought", {"step": 1, "seen": 1, "text": f"I add. {text}", "tokens_in": 10, "tokens_out": 5, "usd": 0.01}),
        ("plan", {"step": 1, "answer": None, "calls": [
            {"call": {"id": "c1", "tool": f"add{text}", "arguments": {"x": text}, "after": []}, "background": False},
            {"call": {"id": "c2", "tool": "sub", "arguments": {}, "after": ["c1"]}, "background": False}]}),
        ("dispatch", {"call": "c1", "tool": "add", "arguments": {}}),
        ("started", {"call": "c1", "attempt": 1, "usd": 0.0}),
        ("retry", {"call": "c1", "attempt": 1, "wait_s": 0.1, "error": f"timeout {text}"}),
        ("started", {"call": "c1", "attempt": 2, "usd": 0.0}),
        ("result", {"call": "c1", "ok": True, "value": f"3 {text}", "seconds": 1.0}),
        ("started", {"call": "c2", "attempt": 1, "usd": 0.5}),
        ("result", {"call": "c2", "ok": False, "error": {"kind": "error", "message": text}, "seconds": 1.0}),
        ("thought", {"step": 2, "seen": 9, "text": "", "tokens_in": 1, "tokens_out": 1, "usd": 0.0}),
        ("plan", {"step": 2, "answer": f"3 {text}", "calls": []}),
        ("final", {"answer": f"3 {text}"}),
    ]  # fmt: skip
    return [
        RunEvent(run=run, seq=seq, time=1000.0 + seq, kind=kind, data=data)
        for seq, (kind, data) in enumerate(said, start=1)
    ]


def write_log(path: Path, *runs: list[RunEvent]) -> None:
    log = EventLog(path)
    for events in runs:
        log.append(events)
    log.close()


class Page(HTMLParser):
    """What stands in a page; anything that may not is in `wrong`."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words = ""
        self.wrong: list[str] = []
        self.elements: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(name)
        if name not in ELEMENTS:
            self.wrong.append(f"<{name}>")
        given = dict(attributes)
        for key, value in given.items():
            if key.startswith("on") or key in ("style", "srcdoc", "formaction"):
                self.wrong.append(f"{name} {key}={value}")
            if key in ("href", "src", "action"):
                self.links.append(value or "")
                if not (value or "").startswith(("/console", "#main")):
                    self.wrong.append(f"{name} {key}={value}")
        if name == "script" and not (given.get("src") and given.get("nonce")):
            self.wrong.append("a script of its own")

    def handle_data(self, data: str) -> None:
        self.words += data
