"""The how-to on verifiers, followed: its program in verifiers' own environment, trained on by a real run.

`SHOAL_VERIFIERS` names that environment's Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import REPOSITORY

from tiny import tiny_config, tiny_model, write_config

__all__ = ["tiny_model"]

PYTHON = os.environ.get("SHOAL_VERIFIERS", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="needs an environment with verifiers, its Python named by SHOAL_VERIFIERS"),
]

TASKSET = """
import verifiers.v1 as vf


class DigitTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def digit(self, trace) -> float:
        return float(trace.last_reply[:1].isdigit())


class DigitTaskset(vf.Taskset[DigitTask, vf.TasksetConfig]):
    def load(self):
        return [DigitTask(vf.TaskData(prompt=f"{n}?"), self.config.task) for n in range(64)]


__all__ = ["DigitTaskset"]
"""


def test_a_run_trains_on_a_taskset(tmp_path: Path, tiny_model: Path) -> None:
    page = (REPOSITORY / "docs" / "howto" / "verifiers.md").read_text()
    (program,) = re.findall(r"`verifiers_agent\.py`:\n\n```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "verifiers_agent.py").write_text(program)
    (tmp_path / "digits.py").write_text(TASKSET)
    listed = subprocess.run(
        [PYTHON, "verifiers_agent.py", "digits", "48"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert listed.returncode == 0, listed.stderr
    assert [json.loads(line)["question"] for line in listed.stdout.splitlines()] == [f"{n}?" for n in range(48)]
    (tmp_path / "tasks.jsonl").write_text(listed.stdout)
    settings = {
        "command": [PYTHON, "verifiers_agent.py", "digits"],
        "tasks": "jsonl",
        "task_settings": {"path": "tasks.jsonl", "grader": "exact"},
        "reward": "stdout",
        "parallel": 2,
        "deadline_s": 120.0,
    }
    changes = {"envs": {"digit": {"type": "external", "settings": settings}}, "run__steps": 1, "workers__count": 1}
    changes |= {"eval__before": False, "eval__after": False, "rollout__groups_per_step": 1}
    changes |= {"rollout__lease_timeout_s": 300.0}
    config = write_config(tmp_path / "verifiers.toml", tiny_config(tiny_model, tmp_path / "runs", **changes))
    command = [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"]
    environment = os.environ | {"SHOAL_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "tiny" / "episodes" / "000000.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    assert len(episodes) == 4
    for episode in episodes:
        (turn,) = episode["turns"]
        assert episode["reward"] == float(turn["completion"]["text"][:1].isdigit())
        assert turn["observation"] != "" and episode["reward_parts"]["digit"] == episode["reward"]
