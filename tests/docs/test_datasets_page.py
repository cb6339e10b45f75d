"""The how-to on data sets, followed with a folder in place of the hub's data set: a run, and an evaluation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documented import REPOSITORY

from shoal.config import config_from
from tiny import tiny_config, tiny_model, write_config

__all__ = ["tiny_model"]

pq = pytest.importorskip("pyarrow.parquet", reason="needs datasets: pip install 'shoal[datasets]'")
pa = pytest.importorskip("pyarrow")

PAGE = (REPOSITORY / "docs" / "howto" / "datasets.md").read_text()


def settings_of_the_page() -> dict[str, object]:
    (text,) = re.findall(r"`gsm8k\.toml`:\n\n```toml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    ((kind, settings),) = config_from(tomllib.loads(text)).worlds.values()
    assert kind == "dataset"
    return dict(settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_trains_on_a_data_set(tmp_path: Path, tiny_model: Path) -> None:
    """The folder is laid out as the hub's repository of that name is: two configurations, each with two splits."""
    folder = tmp_path / "gsm8k"
    for name, start in (("train", 0), ("test", 100)):
        rows = [{"question": f"{i} + 1?", "answer": f"So\n#### {i + 1}"} for i in range(start, start + 40)]
        (folder / "main").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "main" / f"{name}-00000-of-00001.parquet")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n{FILES.format(name=name)}" for name in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    settings = settings_of_the_page() | {"name": str(folder), "instruction": ""}
    changes = {"envs": {"gsm8k": {"type": "dataset", "settings": settings}}, "run__steps": 2, "workers__count": 1}
    changes |= {"eval__questions": 8, "rollout__groups_per_step": 1}
    config = write_config(tmp_path / "gsm8k.toml", tiny_config(tiny_model, tmp_path / "runs", **changes))
    environment = os.environ | {"SHOAL_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub")}

    def shoal(*words: str) -> str:
        command = [sys.executable, "-m", "shoal.cli", *words, "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shoal("train", str(config))
    kept = sorted((tmp_path / "runs" / "tiny" / "episodes").iterdir())
    episodes = [json.loads(line) for path in kept for line in path.read_text().splitlines()]
    assert len(episodes) == 8
    for episode in episodes:
        data = episode["task"]["data"]
        assert data["question"] == f"{int(data['answer']) - 1} + 1?" and int(data["answer"]) <= 40
    found = json.loads(shoal("eval", str(tiny_model), "--config", str(config), "--questions", "8", "--max-tokens", "8"))
    assert found["questions"] == 8


FILES = """  - split: train
    path: {name}/train-*
  - split: test
    path: {name}/test-*
"""
