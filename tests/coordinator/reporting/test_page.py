"""The report and its pictures: complete, safe, and possible at any moment of a run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.coordinator.reporting.markup import tag, text
from shoal.coordinator.reporting.page import write_report
from shoal.coordinator.reporting.plots import PLOTS, draw_plots
from shoal.coordinator.reporting.record import read_run
from shoal.errors import RunError
from shoal.protocol.codec import to_json
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.event import Event
from shoal.protocol.sampling import Completion

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\x00$\\frac"

CONFIG = '[run]\nname = "sums"\n\n[learner]\nmode = "async"\nmax_staleness = 2\n'


def step(number: int, **more: Any) -> dict[str, Any]:
    point = {
        "kind": "step", "step": number, "time": 1000.0 + 10 * number, "reward": 0.1 * number, "reward_std": 0.3,
        "loss": 0.01, "grad_norm": 1.0, "entropy": 0.5, "mismatch_kl": 0.002, "clip_fraction": 0.01,
        "staleness_mean": 1.2, "staleness_max": 2, "response_tokens_mean": 20.0, "tokens": 1500, "groups": 8,
        "groups_skipped": 1, "swept": 2, "wait_s": 1.0, "train_s": 8.0, "publish_s": 0.5, "tokens_per_s": 250.0,
        "workers": 2,
    }  # fmt: skip
    return {**point, **more}


def evaluation(version: int, strict: float) -> dict[str, Any]:
    return {"kind": "eval", "version": version, "time": 1001.0 + 10 * version, "questions": 200, "strict": strict,
            "lenient": strict + 0.1, "response_tokens_mean": 18.0}  # fmt: skip


def write_metrics(path: Path, points: list[dict[str, Any]], end: str = "\n") -> None:
    (path / "metrics.jsonl").write_text("\n".join(json.dumps(point) for point in points) + end, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of six steps."""
    workers = {"rollouts/anna": 40.0, "rollouts/bert": 24.0, "staleness/1": 50.0, "staleness/2": 14.0}
    write_metrics(tmp_path, [evaluation(0, 0.3), *(step(n, **workers) for n in range(1, 7)), evaluation(6, 0.7)])
    events = [Event(time=1000.0 + n, node="n1", kind="snapshot.published", data={"version": n}) for n in range(40)]
    events.append(Event(time=1020.0, node="n2", kind="lease.expired", data={"reason": "no heartbeat"}))
    for name, by_source in (("anna", {"learner": 5e6, "bert": 3e6}), ("bert", {"anna": 7e6, HOSTILE: math.inf})):
        data = {"name": name, "version": 3, "seconds": 1.5, "by_source": by_source}
        events.append(Event(time=1021.0, node=name, kind="snapshot.arrived", data=data))
    (tmp_path / "events.jsonl").write_bytes(b"".join(to_json(event) + b"\n" for event in events))
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8")
    summary = {
        "accuracy_before": 0.31, "accuracy_after": 0.72, "accuracy_before_lenient": 0.4, "seconds": 700,
        "gain_interval": [0.33, 0.49], "heldout_questions": 200, "model_saved": "model/",
        "samples": [{"question": "What is 2 + 3?", "answer": "5", "before": "It is 23.", "after": "2 + 3 = 5"}],
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return tmp_path


class Page(HTMLParser):
    """What a browser would see: the elements, their attributes, and the text; unclosed elements are errors."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_a_finished_run(run: Path) -> None:
    page = page_of(run)
    for words in (
        "31.0 % → 72.0 %", "+41.0 points", "95 % confidence, paired: +33.0 to +49.0", "40.0 % → 80.0 %",
        "2 versions (bound S = 2)", "200", "11:40", "smallest share 37.5 %", "What is 2 + 3?", "It is 23.",
        "2 + 3 = 5", "anna", "62.5 %", "lease.expired", "no heartbeat", "10 more snapshot.published",
        "max_staleness = 2", "model saved", "finished", "staler than the bound 12",
    ):  # fmt: skip
        assert words in page.text.replace("the bound  12", "the bound 12"), words
    assert {path.stem for path in (run / "plots").iterdir()} == {plot.name for plot in PLOTS}


PAID = {"usd": 12.0, "usd_idle": 3.0, "usd_lost_stale": 0.6, "usd_lost_void": 0.0, "usd_lost_rejected": 0.25}


def test_what_a_run_cost_and_what_of_it_came_to_nothing(run: Path) -> None:
    assert "What it cost" not in page_of(run).text, "nothing has a price"
    path = run / "summary.json"
    machines = {"anna": 8.0, "bert": 4.0, HOSTILE: 0.0}
    told = {**PAID, "usd_per_heldout_point": 0.29, "usd_by_machine": machines}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    shown = page_of(run).text
    for words in (
        "What it cost", "all of it 12 100.0 %", "held-out accuracy gained (strict) 0.29", "without work 3 25.0 %",
        "staler than the bound 0.6 5.0 %", "rejected 0.25 2.1 %", "paid for anna 8 66.7 %",
    ):  # fmt: skip
        assert words in shown, (words, shown)
    path.unlink()
    write_metrics(run, [step(1), step(2, **PAID)])
    assert "all of it 12 100.0 %" in page_of(run).text, "a run that goes on tells its newest step's"


def test_the_page_refers_to_nothing_outside_itself_and_runs_no_script(run: Path) -> None:
    page = page_of(run)
    assert not {"script", "link", "iframe", "object", "form", "base"} & {name for name, _ in page.elements}
    references = [value for _, attrs in page.elements for key in ("src", "href") if (value := attrs.get(key))]
    assert len(references) == len(PLOTS)
    for reference in references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        assert b64decode(data).startswith(b"\x89PNG")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html
    assert "viewport" in html


def test_what_models_workers_and_events_say_is_never_markup(run: Path) -> None:
    write_metrics(run, [evaluation(0, 0.3), step(1, **{f"rollouts/{HOSTILE}": 9.0})])
    event = Event(
        time=1.0, node=HOSTILE[:200], kind=f"void.{HOSTILE}"[:128], data={HOSTILE: HOSTILE, "reason": HOSTILE}
    )
    (run / "events.jsonl").write_bytes(to_json(event) + b"\n")
    (run / "config.toml").write_text(f"[run]\nname = '''{HOSTILE.replace(chr(0), '')}'''", encoding="utf-8")
    sample = {"question": HOSTILE, "answer": HOSTILE, "before": HOSTILE, "after": [HOSTILE]}
    summary = {"samples": [sample, 7], HOSTILE: HOSTILE}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = page_of(run)
    ours = "html head meta title style body main header section div h1 h2 p span strong pre figure figcaption img"
    ours += " details summary table thead tbody tr th td"
    assert {name for name, _ in page.elements} <= set(ours.split())
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") >= 9


@given(st.text())
def test_markup_gives_back_the_text_and_nothing_else(words: str) -> None:
    page = Page(tag("p", words, title=words))
    assert [name for name, _ in page.elements] == ["p"]
    harmless = not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", words)
    if harmless:
        assert "".join(page.words) == words
        assert page.elements[0][1]["title"] == words
    assert text(text(words)) == text(words)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "no finished step" in page.text
    assert draw_plots(tmp_path) == []
    with pytest.raises(RunError, match="no run directory"):
        write_report(tmp_path / "nowhere")


def test_a_crashed_run_is_reported_as_far_as_it_went(run: Path) -> None:
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8")
    metrics.write_text("\x00\xff not json\n" + whole + '{"kind": "step", "step": 7, "rew', encoding="utf-8")
    (run / "events.jsonl").write_bytes(b'{"time": 1, "node": "x"\n' + (run / "events.jsonl").read_bytes() + b"{")
    page = page_of(run)
    assert "2 lines of its records could not be read" in page.text
    assert "unfinished" in page.text
    assert "30.0 % → 70.0 %" in page.text
    assert "interval" not in page.text
    assert len(read_run(run).steps) == 6


def test_steps_that_a_resumed_run_repeated_count_once(tmp_path: Path) -> None:
    points = [step(1), step(2, reward=0.2), step(3, reward=0.9), evaluation(2, 0.1), step(2, reward=0.5)]
    write_metrics(tmp_path, [*points, step(3, reward=0.6), evaluation(2, 0.4)])
    record = read_run(tmp_path)
    assert record.column("reward") == [0.1, 0.5, 0.6]
    assert [point["strict"] for point in record.evals] == [0.4]


def test_missing_and_absurd_numbers_are_nan(tmp_path: Path) -> None:
    absurd = {
        "reward": math.nan,
        "loss": math.inf,
        "entropy": None,
        "grad_norm": "3",
        "tokens": True,
        "wait_s": 10**400,
    }
    write_metrics(tmp_path, [step(1, **absurd), step(2), {"kind": "step", "step": None}, {"kind": "other"}])
    record = read_run(tmp_path)
    for key in [*absurd, "never_written"]:
        assert math.isnan(record.column(key)[0]), key
    assert record.total("tokens") == 1500
    assert record.damaged_lines == 2
    assert len(draw_plots(tmp_path)) == len(PLOTS) - 2  # nobody said who the workers were, or how versions came


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "points",
    [
        [step(1)],
        [evaluation(0, 0.3)],
        [{"kind": "step", "step": n} for n in range(5)],
        [step(n, reward=math.nan, staleness_max=math.nan, wait_s=0, train_s=0, publish_s=0) for n in range(12)],
        [step(n, mismatch_kl=-1e-9, entropy=1e12, reward=-1e12) for n in range(12)],
        [step(n, **{f"rollouts/w{w}": 1.0 for w in range(30)}) for n in range(200)],
        [step(n, staleness_max=40, **{"staleness/40": 3, "staleness/x": 1}) for n in range(10)],
        [step(n, staleness_max=0, staleness_mean=0.0, **{"staleness/0": 64}) for n in range(10)],
    ],
)
def test_pictures_of_odd_runs(tmp_path: Path, points: list[dict[str, Any]]) -> None:
    """Warnings would show as errors: layouts that cannot be fitted, limits that are equal."""
    write_metrics(tmp_path, points)
    page = page_of(tmp_path)
    pictures = list(tmp_path.glob("plots/*"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert [name for name, _ in page.elements].count("img") == len(pictures)


def test_a_picture_without_data_any_more_is_removed(run: Path) -> None:
    old = run / "plots" / "workers.png"
    old.parent.mkdir()
    old.write_bytes(b"from an earlier report")
    (run / "summary.json").unlink()
    write_metrics(run, [evaluation(0, 0.5)])
    assert [path.stem for path in draw_plots(run)] == ["learning", "feeding"]
    assert not old.exists()


def test_rollouts_are_shown_where_no_samples_were_kept(tmp_path: Path) -> None:
    completion = Completion(token_ids=(1,), logprobs=(-0.1,), versions=(0,), finish="stop", text="It is <b>5</b>.")
    turn = Turn(context_ids=(1,), observation="What is 2 + 3?", completion=completion)
    task = Task(env="sums", id="2 + 3", seed=0)
    episode = Episode(id="e", group="g", index=0, task=task, turns=(turn,), outcome="done", reward=0.75)
    (tmp_path / "episodes").mkdir()
    line = to_json(episode) + b"\n"
    (tmp_path / "episodes" / "1.jsonl").write_bytes(b"damaged\n" + line + line[:-20])
    write_metrics(tmp_path, [step(1)])
    page = page_of(tmp_path)
    for words in ("What is 2 + 3?", "It is <b>5</b>.", "0.75"):
        assert words in page.text


def test_matplotlib_and_torch_are_not_imported_before_a_picture_is_drawn() -> None:
    code = (
        "import sys, shoal.coordinator.reporting.page; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
