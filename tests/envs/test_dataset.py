"""Data sets in the hub's formats, as files and folders on this machine; what is said where there is no hub.

Nothing here reaches the hub; `test_dataset_hub` fetches from a server that answers as it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.envs.base import Environment
from shoal.envs.registry import make
from shoal.errors import TaskError
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Task

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'shoal[datasets]'")
pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

GSM = [{"question": f"Tom has {i} apples.", "answer": f"He has {i}.\n#### {i * 1000:,}"} for i in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def questions(env: Environment, split: str, count: int) -> set[str]:
    assert split in ("train", "heldout")
    return {env.task(split, index, 0).data["question"] for index in range(count)}  # type: ignore[arg-type]


async def test_a_folder_of_parquet_files_in_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "gsm" / "data" / "train-00000-of-00002.parquet", GSM[:50])
    parquet(tmp_path / "gsm" / "data" / "train-00001-of-00002.parquet", GSM[40:90])
    parquet(tmp_path / "gsm" / "data" / "test-00000-of-00001.parquet", GSM[80:])
    env = make("dataset", {"name": str(tmp_path / "gsm"), "heldout_split": "test", "instruction": "Think."}, name="gsm")
    assert {task.data["question"] for task in env.heldout()} == {row["question"] for row in GSM[80:]}
    assert questions(env, "train", 80) == {row["question"] for row in GSM[:80]}, "what is held out is not trained on"
    task = decode(encode(env.task("train", 0, 0)), Task)
    elsewhere = make("dataset", {"name": "owner/elsewhere", "instruction": "Think."})
    assert (await elsewhere.reset(task)).messages[-1].content == f"{task.data['question']} Think."
    assert (await elsewhere.step(f"So {task.data['answer']}")).reward == 1.0


def test_a_file_and_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    parquet(tmp_path / "gsm.parquet", GSM)
    env = make(
        "dataset", {"name": "$SHOAL_DATA/gsm.parquet", "train_split": "train[:60]", "heldout_split": "train[60:]"}
    )
    assert questions(env, "train", 60) == {row["question"] for row in GSM[:60]}
    assert len(env.heldout()) == 40
    shared = make("dataset", {"name": str(tmp_path / "gsm.parquet"), "heldout_fraction": 0.3})
    held = {task.id for task in shared.heldout()}
    assert 15 <= len(held) <= 45 and held.isdisjoint(shared.task("train", index, 0).id for index in range(100))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sums.{suffix}"
    if suffix == "csv":
        path.write_text("question,answer\n" + "".join(f"{i} + 1?,{i + 1}\n" for i in range(20)))
    else:
        path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(20)))
    env = make("dataset", {"name": str(path), "heldout_fraction": 0.5})
    assert {task.data["answer"] for task in env.heldout()} <= {str(i + 1) for i in range(20)}
    assert len(env.heldout()) + len(questions(env, "train", 40)) == 20


def test_configurations_of_a_folder(tmp_path: Path) -> None:
    parquet(tmp_path / "two" / "a.parquet", GSM[:10])
    parquet(tmp_path / "two" / "b.parquet", GSM[10:30])
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in "ab")
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    env = make("dataset", {"name": str(tmp_path / "two"), "subset": "b", "heldout_fraction": 0.5})
    assert questions(env, "train", 40) | {task.data["question"] for task in env.heldout()} == {
        row["question"] for row in GSM[10:30]
    }
    with pytest.raises(TaskError, match="cannot be read"):
        make("dataset", {"name": str(tmp_path / "two"), "subset": "c"}).task("train", 0, 0)


async def test_choices_with_labels_in_nested_columns(tmp_path: Path) -> None:
    choices = {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}
    rows = [{"id": str(i), "q": {"stem": f"Colour {i}?"}, "choices": choices, "key": str(i % 3 + 1)} for i in range(30)]
    settings = {"question_key": "q.stem", "answer_key": "key", "choices_key": "choices.text"}
    settings |= {"name": str(parquet(tmp_path / "arc.parquet", rows)), "grader": "choice"}
    env = make("dataset", settings | {"labels_key": "choices.label"})
    task = next(
        task for task in env.tasks("train") if task.data["question"] in {f"Colour {i}?" for i in range(1, 30, 3)}
    )
    assert task.data["answer"] == "B"
    assert (await env.score(task, ["Green."])).reward == 1.0
    assert (await env.score(task, ["The answer is C."])).reward == 0.0


def test_rows_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"q{i}", "answer": "x^2" if i % 4 == 0 else str(i)} for i in range(40)]
    settings = {"name": str(parquet(tmp_path / "maths.parquet", rows)), "heldout_fraction": 0.5}
    with pytest.raises(TaskError, match=r"row 0: the answer 'x\^2' is not a number.*skip_unfit"):
        make("dataset", settings).task("train", 0, 0)
    env = make("dataset", settings | {"skip_unfit": True})
    assert len(questions(env, "train", 60)) + len(env.heldout()) == 30
    assert "10 of 40 rows left out" in caplog.text
    none = {"name": str(parquet(tmp_path / "none.parquet", rows[:1])), "skip_unfit": True}
    with pytest.raises(TaskError, match="is not a number"):
        make("dataset", none).task("train", 0, 0)


def test_columns_splits_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "gsm.parquet", GSM)
    for settings, said in (
        ({"name": str(path), "question_key": "prompt"}, r"no column 'prompt'; it has question, answer"),
        ({"name": str(path), "train_split": "test"}, r"Unknown split|cannot be read"),
        ({"name": str(tmp_path / "notes.txt")}, "no file of a data set"),
        ({"name": str(tmp_path / "broken.parquet")}, "cannot be read"),
        ({"name": str(tmp_path / "empty")}, "cannot be read"),
    ):
        (tmp_path / "notes.txt").write_text("words")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 but nothing else")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(TaskError, match=said):
            make("dataset", settings).task("train", 0, 0)


def test_no_reader_but_the_known_ones(tmp_path: Path) -> None:
    """Text, archives and pictures have readers of their own, some of which would unpickle."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("a line\n")
    with pytest.raises(TaskError, match="reader 'text'"):
        make("dataset", {"name": str(tmp_path / "texts")}).task("train", 0, 0)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit(7)")
    with pytest.raises(TaskError, match="scripts are no longer supported"):
        make("dataset", {"name": str(tmp_path / "code")}).task("train", 0, 0)


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, pytest.param({"HF_ENDPOINT": "http://127.0.0.1:1"}, marks=pytest.mark.slow)],
)
def test_where_there_is_no_hub(tmp_path: Path, environment: dict[str, str]) -> None:
    """In a process of its own: the hub's address and its absence are read once."""
    code = (
        "from shoal.envs.registry import make; from shoal.errors import TaskError\n"
        "try: make('dataset', {'name': 'openai/gsm8k', 'subset': 'main'}).task('train', 0, 0)\n"
        "except TaskError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "does not answer, and it was not fetched before. Connect to the internet; or" in done.stdout, done.stderr
    assert "hf download --repo-type dataset openai/gsm8k --local-dir" in done.stdout
