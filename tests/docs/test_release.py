"""A release's parts: a wheel that is the same whoever builds it, and licences that let it be used."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from documented import REPOSITORY

sys.path.append(str(REPOSITORY / "deploy"))

from release import barred, build_wheel


@pytest.mark.parametrize(
    ("licence", "fine"),
    [
        ("MIT License", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("LGPL-3.0-or-later", True),
        ("UNKNOWN", False),
        ("CC-BY-NC-4.0", False),
        ("MIT; for non-commercial use", False),
        ("Business Source License 1.1", False),
        ("GPL-3.0-only", False),
    ],
)
def test_licences_that_forbid_use_are_found(licence: str, fine: bool) -> None:
    assert bool(barred([{"Name": "some-package", "License": licence}])) != fine


def test_the_exceptions_are_named() -> None:
    assert not barred([{"Name": "nvidia-cublas", "License": "NVIDIA Proprietary Software"}])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_is_reproducible_and_whole(tmp_path: Path) -> None:
    wheels = []
    for name in ("one", "two"):
        build_wheel(tmp_path / name, epoch=1_700_000_000)
        wheels += list((tmp_path / name).glob("*.whl"))
    one, two = wheels
    assert one.read_bytes() == two.read_bytes()
    held = set(zipfile.ZipFile(one).namelist())
    configs = {path.relative_to(REPOSITORY / "configs") for path in (REPOSITORY / "configs").rglob("*.toml")}
    assert {f"shoal/configs/{path.as_posix()}" for path in configs} <= held and configs
    sources = {path for path in (REPOSITORY / "src" / "shoal").rglob("*") if path.is_file()}
    names = {path.relative_to(REPOSITORY / "src") for path in sources}
    assert {name.as_posix() for name in names if not re.search(r"__pycache__|/\.", f"/{name}")} <= held
    assert not [name for name in held if name.startswith(("tests/", "docs/", "benchmarks/")) or "__pycache__" in name]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_alone_is_enough(tmp_path: Path) -> None:
    """Installed into an environment that has this one's packages but not this checkout, away from it."""
    build_wheel(tmp_path / "dist", epoch=1_700_000_000)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    # The dependencies are taken from this environment's folder; the package itself from the wheel, which comes first.
    (place,) = environment.glob("lib/python*/site-packages")
    (place / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    clean = {"PATH": "/usr/bin:/bin", "SHOAL_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "NO_COLOR": "1"}

    def said(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shoal(*arguments: str) -> str:
        return said(environment / "bin" / "shoal", *arguments)

    assert said(python, "-c", "import shoal; print(shoal.__file__)").startswith(str(environment)), "it is the wheel's"
    assert "shoal demo" in shoal("demo", "--help")
    assert "arithmetic" in shoal("config", "list")
    assert "checks" in shoal("doctor")
    plan = ("--rollouts-per-step", "128", "--train-s", "60", "--rollouts-per-s", "0.3", "--workers", "16")
    assert "workers" in shoal("plan", *plan, "--bcast-s", "18")
    assert "run" in shoal("train", "arithmetic", "--dry-run")
