"""`shoal loop`: what runs, how far it is, what it reports; and the whole of it as processes, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import Process, Run, Runs, children_of, is_alive, processes_of, until

from shoal.cli.app import main
from shoal.cli.loop_collective import has_steps
from shoal.cli.loop_parts import parts_of
from shoal.cli.loop_report import page, report
from shoal.cli.loop_state import LoopFolder, LoopState
from shoal.config import Config, config_from, load_config
from shoal.errors import ConfigError, RunError, StorageError, TaskError
from shoal.memory.recalling import entries_of
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode
from tiny import tiny_config, write_config

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from engine_cases import PLAIN, make_checkpoint

EXPERTS = {
    "reckoner": {
        "answer": "[0-9]{1,2}",
        "skills": {"sums of numbers": 0.5, "differences of numbers": 0.5},
        "slots": 4,
        "max_tokens": 8,
    },
    "scribe": {"answer": "[IVX]{1,4}", "skills": {"Roman numerals": 0.5}, "slots": 4, "max_tokens": 8},
}


def tables(model: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A loop of a tiny model, as tables."""
    loop = {"minutes": 0.1, "questions": 8, "problems": 2, "planners": 1, "problem_timeout_s": 30.0, "experts": EXPERTS}
    loop |= {"practice": 2, "practice_every_s": 0.5, "learn_every_s": 3.0, "request_every_s": 0.3, "candidates": 2}
    given = {
        "model__context_tokens": 1024,
        "learner__checkpoint_every": 50,
        "workers__count": 1,
        "workers__cache_tokens": 8192,
        "memory": {"recall": True, "entries": 1, "max_tokens": 512, "share": 0.5},
        "serving": {"port": 0},
        "output": {"plots": False},
        "loop": loop,
    }
    return tiny_config(model, runs, **{**given, **changes})


def made(folder: Path, **changes: Any) -> LoopFolder:
    values: dict[str, Any] = {"minutes": 1.0, "memory": False, "collective": True, **changes}
    (folder / "run").mkdir(exist_ok=True)
    return LoopFolder(folder / "run", LoopState(**values))


# What runs


def test_the_shipped_loop_says_what_it_leaves_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(repository / "configs" / "loop.toml")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    few = parts_of(config)
    assert "web" not in few.config.envs and "4 are needed" in few.left_out["web"]
    assert {"arithmetic", "tools"} <= set(few.config.envs) and few.memory and few.collective
    assert len(few.processes) >= 6 and len(set(few.processes)) == len(few.processes)
    bare = parts_of(config, ("memory", "collective"))
    assert not bare.memory and not bare.collective
    assert set(few.processes) - set(bare.processes) == {"agents", "memory"}


def test_what_is_not_installed_is_left_out_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    given = tables(tmp_path, tmp_path)
    given["envs"]["gone"] = {"type": "no_such_package.worlds:World"}
    parts = parts_of(config_from(given))
    assert set(parts.config.envs) == {"digit"} and "no_such_package" in parts.left_out["gone"]
    del given["envs"]["digit"]
    with pytest.raises(TaskError, match="no_such_package"):
        parts_of(config_from(given))


def test_wrong_settings_are_an_error_and_not_left_out(tmp_path: Path) -> None:
    given = tables(tmp_path, tmp_path)
    given["envs"]["sums"] = {"type": "arithmetic", "settings": {"wordings": "?"}}
    with pytest.raises(ConfigError, match="wording"):
        parts_of(config_from(given))
    with pytest.raises(ConfigError, match="colocated"):
        parts_of(config_from(tables(tmp_path, tmp_path, learner={"mode": "colocated"})))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["loop", "--resume", "nowhere"], "nowhere"),
        (["loop", "--resume", "x", "--minutes", "3"], "keeps its configuration"),
        (["loop", "--without", "everything"], "everything"),
        (["loop", "none.toml"], "none.toml"),
        (["loop", "--minutes", "0"], "minutes"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], shoal_home: Path
) -> None:
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert complaint in f"{error['problem']} {error['remedy']}"


def test_a_dry_run_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = tables(tmp_path / "model", tmp_path / "runs")
    given["envs"]["gone"] = {"type": "no_such_package.worlds:World"}
    path = write_config(tmp_path / "loop.toml", given)
    assert main(["loop", str(path), "--without", "memory", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["environments"] == {"digit": "tiny:FirstDigit"} and set(plan["left_out"]) == {"gone", "memory"}
    assert main(["loop", str(path), "--dry-run"]) == 0
    assert "left out: gone" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


# How far it is


def test_a_folder_is_one_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    first = made(tmp_path)
    first.spent("before", 2.0)
    first.spent("before", 3.0)
    first.restarted("server")
    first.add("before.jsonl", family="digit")
    first.set(stage="train")
    with pytest.raises(RunError):
        LoopFolder(tmp_path / "run")
    first.close()
    with (tmp_path / "run" / "loop" / "before.jsonl").open("ab") as half:
        half.write(b'{"family": "di')
    again = LoopFolder(tmp_path / "run")
    assert again.state == first.state and again.state.seconds == {"before": 5.0}
    assert again.state.restarts == {"server": 1} and again.state.stage == "train"
    again.add("before.jsonl", family="other")
    assert [line["family"] for line in again.lines("before.jsonl")] == ["digit", "other"]
    again.close()
    (tmp_path / "run" / "loop" / "state.json").write_text('{"minutes": "long"}')
    with pytest.raises(StorageError):
        LoopFolder(tmp_path / "run")
    (tmp_path / "plain").mkdir()
    with pytest.raises(RunError):
        LoopFolder(tmp_path / "plain")


# What it reports


def answer(folder: LoopFolder, when: str, family: str, task: int, right: float, **more: Any) -> None:
    line: dict[str, Any] = {"family": family, "task": f"t{task}", "notes": False, "void": False}
    folder.add(f"{when}.jsonl", **{**line, "strict": right, "lenient": right, **more})


def reported(folder: LoopFolder) -> dict[str, Any]:
    config = config_from({"envs": {"digit": {"type": "tiny:FirstDigit"}}})
    return report(config, folder)


def test_families_are_compared_question_by_question(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for task in range(60):
        answer(folder, "before", "up", task, float(task < 10))
        answer(folder, "after", "up", task, float(task < 40))
        answer(folder, "before", "down", task, float(task < 30))
        answer(folder, "after", "down", task, float(task < 27))
    answer(folder, "before", "up", 60, 1.0)
    answer(folder, "after", "up", 60, 0.0, void=True)
    answer(folder, "before", "only before", 1, 1.0)
    found = reported(folder)
    rows = {row["family"]: row for row in found["families"]}
    assert set(rows) == {"up", "down"} and rows["up"]["questions"] == 60, "what one side lacks counts on none"
    assert rows["up"]["gain"] == pytest.approx(0.5) and rows["up"]["interval"][0] > 0
    assert found["families_improved"] == 1 and found["worst_family_points"] == pytest.approx(-5.0)
    folder.close()


def test_an_answer_with_notes_stands_for_the_one_without(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for task in range(10):
        answer(folder, "before", "up", task, 0.0)
        answer(folder, "after", "up", task, float(task < 2))
    answer(folder, "after", "up", 7, 1.0, notes=True)
    answer(folder, "after", "up", 0, 0.0, notes=True)
    answer(folder, "after", "up", 8, 1.0, notes=True, void=True)
    (row,) = reported(folder)["families"]
    assert row["noted"] == 2 and row["after_alone"] == pytest.approx(0.2) and row["after"] == pytest.approx(0.2)
    folder.close()


def test_a_report_of_nothing_and_of_everything_is_a_page(tmp_path: Path) -> None:
    folder = made(tmp_path, left_out={"web": "no browser"})
    assert "Not finished" in page(reported(folder)) and "web: no browser" in page(reported(folder))
    for when, right in (("before", 0), ("after", 1)):
        for task in range(20):
            answer(folder, when, "sums", task, float(right))
        for number in range(4):
            values = {"number": number, "right": bool(right), "answer": "4", "seconds": 2.0}
            folder.add(f"problems-{when}.jsonl", **values)
    for version in (0, 3, 3, 5, 4):
        folder.add("requests.jsonl", status=200, seconds=0.5, version=version)
    folder.add("requests.jsonl", status=503, seconds=0.5)
    folder.add("practice.jsonl", turn=0, what="exercise", right=True)
    folder.add("practice.jsonl", turn=1, what="nothing", reason="nobody is here")
    folder.set(stage="done", seconds={"before": 30.0, "train": 90.0}, most_processes=7, restarts={"server": 2})
    found = reported(folder)
    serving = found["serving"]
    assert (serving["requests"], serving["failed"], serving["versions"], serving["went_back"]) == (6, 1, 4, 1)
    assert found["problems"]["after"] == 1.0 and found["practice"] == {
        "exercise": 1,
        "exercise right": 1,
        "nothing": 1,
        "nothing right": 0,
    }
    text = page(found)
    for words in ("2.0 minutes", "| sums | 20 | 0.0% | 100.0% |", "0% of 4", "100% after", "6 requests", "server was"):
        assert words in text, words
    assert "Not finished" not in text
    folder.close()


# The whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, which can be held to JSON."""
    return make_checkpoint(tmp_path_factory.mktemp("loop") / "model", PLAIN, max_position_embeddings=2048)


def begin(runs: Runs, model: Path, *words: str, **changes: Any) -> tuple[Process, Run]:
    path = write_config(runs.path / "loop.toml", tables(model, runs.path / "runs", **changes))
    return runs.shoal("loop", path, "--json", *words), Run(runs.path / "runs" / "tiny")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_at_once_ends_in_a_report(runs: Runs, model: Path) -> None:
    """More steps than the time allows: training drains, and what it had done becomes the model."""
    loop, run = begin(runs, model, run__steps=100_000)
    assert loop.process.wait(600) == 0, loop.said
    found = loop.result
    assert found["finished"] and found["processes"] >= 6 and found["left_out"] == {}
    (row,) = found["families"]
    assert row["family"] == "digit" and row["questions"] == 8 and "families_improved" in found
    assert found["problems"]["questions"] == 2
    assert 1 <= found["training"]["steps"] < 100_000 and found["training"]["published"] > 1
    assert found["serving"]["requests"] > 5 and found["serving"]["failed"] == 0
    assert found["serving"]["versions"] > 1 and found["serving"]["went_back"] == 0, (
        "it serves what is trained, as it is"
    )
    assert found["practice"]["exercise"] > 0
    assert json.loads((run.path / "report.json").read_text()) == found
    assert "# The loop: tiny" in (run.path / "report.md").read_text()
    assert (run.path / "model" / "config.json").exists()
    config = load_config(run.path / "config.toml")
    assert config.run.steps == found["training"]["steps"]
    kept = run.path / "loop" / "steps.jsonl"
    assert "steps" not in config.envs or has_steps(kept), "an environment only where there was something to learn"
    learnt = [line for line in list(read_jsonl(kept, Episode)) if line.outcome == "done"]
    assert max(one.version for one in learnt) > 0, "experts take on the versions, and what they do is kept"
    assert processes_of(runs.path) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_interrupted_it_leaves_nothing_and_goes_on(runs: Runs, model: Path) -> None:
    loop, run = begin(runs, model, run__steps=40)
    until(lambda: len(run.steps) >= 2, loop, run)
    inside = children_of(loop.pid)
    assert len(inside) >= 5
    loop.send(signal.SIGKILL)
    loop.process.wait()
    until(lambda: not any(is_alive(pid) for pid in inside))
    assert processes_of(runs.path) == [], "nobody outlives it"

    again = runs.shoal("loop", "--resume", run.path, "--json")
    before = len(run.steps)
    until(lambda: len(run.steps) > before, again, run)
    again.send(signal.SIGTERM)
    assert again.wait() == 130 and f"shoal loop --resume {run.path}" in again.said
    assert processes_of(runs.path) == []

    last = runs.shoal("loop", "--resume", run.path, "--json")
    assert last.process.wait(600) == 0, last.said
    found = last.result
    assert found["finished"] and found["training"]["steps"] >= 4
    asked = [line for line in LoopFolder(run.path).lines("before.jsonl") if not line["notes"]]
    assert len({line["task"] for line in asked}) == len(asked) == 8, "nothing is asked twice"
    assert processes_of(runs.path) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_memory_and_collective_fewer_take_part(runs: Runs, model: Path) -> None:
    loop, run = begin(runs, model, "--without", "memory", "--without", "collective", run__steps=3)
    assert loop.process.wait(600) == 0, loop.said
    found = loop.result
    assert found["finished"] and set(found["left_out"]) == {"memory", "collective"}
    assert "memories" not in found and "problems" not in found and found["training"]["steps"] == 3
    assert not (run.path / "loop" / "collective").exists() and not (run.path / "loop" / "memory").exists()
    for batch in run.episodes().values():
        assert not any(entries_of(episode.task) for episode in batch)
    assert processes_of(runs.path) == []


def test_the_loops_configuration_reads_back(repository: Path) -> None:
    from shoal.config import to_toml
    from shoal.config.toml import tables_of

    config: Config = load_config(repository / "configs" / "loop.toml")
    assert config_from(tables_of(to_toml(config))) == config
    assert set(config.loop.experts) == {"reckoner", "speller", "scribe"}
