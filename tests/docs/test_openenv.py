"""The how-to on OpenEnv, followed: its environment in openenv's own, its configuration, a real run that trains in it.

`SHOAL_OPENENV` names the Python of an environment with openenv.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documented import REPOSITORY

from openenv_server import started
from shoal.config import config_from
from shoal.envs.registry import make
from tiny import tiny_config, tiny_model, write_config

__all__ = ["tiny_model"]

PYTHON = os.environ.get("SHOAL_OPENENV", "")
PAGE = (REPOSITORY / "docs" / "howto" / "openenv.md").read_text()

needs_openenv = pytest.mark.skipif(
    not PYTHON, reason="needs an environment with openenv, its Python named by SHOAL_OPENENV"
)


def block(name: str, language: str) -> str:
    (found,) = re.findall(rf"`{name}`:\n\n```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_pages_configuration_is_one() -> None:
    pytest.importorskip("websockets", reason="needs websockets: pip install 'shoal[openenv]'")
    config = config_from(tomllib.loads(block("guessing.toml", "toml")))
    for kind, settings in config.worlds.values():
        assert make(kind, settings).task("train", 0, 0).seed < 2**30


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "guessing.py"
    path.write_text(block("guessing.py", "python"))
    return path


@needs_openenv
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_pages_environment_is_played(program: Path) -> None:
    (settings,) = [
        settings for _, settings in config_from(tomllib.loads(block("guessing.toml", "toml"))).worlds.values()
    ]
    with started(PYTHON, program) as url:
        env = make("openenv", settings | {"base_url": url})
        task = env.task("train", 0, 0)
        rewards = [asyncio.run(env.score(task, [f'{{"digit": {digit}}}'])).reward for digit in range(10)]
        assert sorted(rewards) == [0.0] * 9 + [1.0]
        lost = asyncio.run(env.score(task, [f'{{"digit": {(rewards.index(1.0) + 1) % 10}}}'] * 4))
        assert (lost.reward, lost.done) == (0.0, True)


@needs_openenv
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_trains_in_it(program: Path, tmp_path: Path, tiny_model: Path) -> None:
    """As text, which the tiny model can write; a reply that is no digit is refused by the server."""
    settings = {"form": "text", "action_key": "digit", "observation_keys": ["text"], "parallel": 4, "max_turns": 2}
    with started(PYTHON, program) as url:
        envs = {"guessing": {"type": "openenv", "settings": settings | {"base_url": url}}}
        changes = {"envs": envs, "run__steps": 2, "workers__count": 1, "rollout__max_tokens": 1}
        changes |= {"model__context_tokens": 256, "eval__questions": 4, "rollout__groups_per_step": 1}
        config = write_config(tmp_path / "guessing.toml", tiny_config(tiny_model, tmp_path / "runs", **changes))
        command = [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"]
        environment = os.environ | {"SHOAL_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    kept = sorted((tmp_path / "runs" / "tiny" / "episodes").iterdir())
    episodes = [json.loads(line) for path in kept for line in path.read_text().splitlines()]
    assert len(episodes) == 8
    for episode in episodes:
        first, *rest = episode["turns"]
        assert episode["reward_parts"]["turns"] == 1 + len(rest) <= 2
        for turn in rest:
            taken = first["completion"]["text"].strip().isdigit()
            assert turn["observation"].startswith("No, " if taken else "That is no action here: digit: Input should be")
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["rollouts"]["accepted"] >= 8 and not summary["rollouts"].get("rejected"), (
        "the coordinator's own session said the same"
    )
