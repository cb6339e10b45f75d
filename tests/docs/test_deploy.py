"""Files for containers, systemd and SkyPilot: well formed, about files that are there, in commands that are taken."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from documented import REPOSITORY, take

DEPLOY = REPOSITORY / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
INSTRUCTIONS = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "ENTRYPOINT", "CMD"}


def unit(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(path.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_containers_recipe_names_files_that_are_there() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} <= INSTRUCTIONS
    copied = [word for name, rest in lines if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert copied and all((REPOSITORY / name).exists() for name in copied)
    (entry,) = [rest for name, rest in lines if name == "ENTRYPOINT"]
    assert yaml.safe_load(entry)[-1] == "shoal"


def test_the_composed_services_are_commands() -> None:
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(composed["services"]) == {"train", "worker", "serve"}
    for service in composed["services"].values():
        take(service["command"])
        assert service["build"]["dockerfile"] == "deploy/Dockerfile"
        volumes = {name.partition(":")[0] for name in service["volumes"] if not name.startswith("/")}
        assert volumes <= set(composed["volumes"])
        assert set(service.get("depends_on", {})) <= set(composed["services"])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command(path: Path) -> None:
    found = unit(path)
    assert set(found) == {"Unit", "Service", "Install"}
    words = shlex.split(found["Service"]["ExecStart"])
    assert words[0].endswith("/shoal")
    take(words[1:])
    assert found["Service"]["NoNewPrivileges"] == "yes" and found["Service"]["DynamicUser"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_a_unit(path: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60)
    wrong = [line for line in done.stderr.splitlines() if path.name in line and "is not executable" not in line]
    assert not wrong


def test_the_spot_workers_are_a_command() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot" / "workers.yaml").read_text())
    (line,) = [line for line in task["run"].splitlines() if "shoal worker" in line]
    take(shlex.split(line)[2:])
    assert set(task) <= {"name", "resources", "secrets", "workdir", "setup", "run"}
