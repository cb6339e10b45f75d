"""What a release is made of, in dist/: `make release`.

    shoal-*.whl           built twice, byte for byte the same (times are the last commit's)
    requirements.lock     every package at one version, with its hashes: pip install --require-hashes -r …
    sbom.cdx.json         the bill of materials of exactly that, as CycloneDX
    licences.json         each package's licence; one that is unknown or forbids use ends the release
    audit.json            known weaknesses, where the advisory service can be reached; else it says that it was not

The wheel is installed from the lock into an environment of its own and tried there, so what is described is what runs.
The packages come from where uv is told (UV_DEFAULT_INDEX), by default PyPI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DIST = REPOSITORY / "dist"
WORK = REPOSITORY / "build" / "release"
BIN = Path(sys.executable).parent

STEP_S = 1800.0
"""The longest that one step may take: torch alone is hundreds of megabytes."""

AUDIT_S = 180.0

FREE = re.compile(
    r"MIT|Apache|BSD|\bISC|\bPSF|Python Software Foundation|Python-2|\bMPL|Mozilla|HPND|CMU|Unlicense|CC0|"
    r"Public Domain|Zlib|0BSD|BlueOak|EPL|Eclipse|LGPL|Lesser General|Historical Permission|Zope",
    re.IGNORECASE,
)
"""Licences under which anybody may use, change and pass on a package beside others."""

BARRED = re.compile(
    r"non-?commercial|\bNC\b|proprietary|all rights reserved|evaluation|SSPL|BUSL|Business Source", re.IGNORECASE
)

ALLOWED: Mapping[str, str] = {"nvidia-": "NVIDIA's libraries for CUDA: free to use with torch, which asks for them"}
"""Beginnings of names that may have another licence, and why."""


def main() -> int:
    """Make all of it; the first step that fails ends it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    DIST.mkdir(exist_ok=True)
    wheel = reproducible_wheel()
    lock = DIST / "requirements.lock"
    _uv("pip", "compile", "pyproject.toml", "-c", "constraints.txt", "--generate-hashes", "--quiet", "-o", str(lock))
    python = WORK / "venv" / "bin" / "python"
    _uv("venv", "--python", sys.executable, "--quiet", str(WORK / "venv"))
    _uv("pip", "install", "--python", str(python), "--require-hashes", "--quiet", "-r", str(lock))
    _uv("pip", "install", "--python", str(python), "--no-deps", "--quiet", str(wheel))
    for arguments in (["--version"], ["demo", "--help"], ["config", "list"]):
        _call([str(python.with_name("shoal")), *arguments], cwd=WORK)
    _call([str(BIN / "cyclonedx-py"), "environment", "--of", "JSON", "-o", str(DIST / "sbom.cdx.json"), str(python)])
    listed = _call(
        [str(BIN / "pip-licenses"), f"--python={python}", "--format=json", "--from=mixed", "--with-urls"], capture=True
    )
    (DIST / "licences.json").write_text(listed)
    if wrong := barred(json.loads(listed)):
        print("licences:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    _audit(lock)
    print("released:", *sorted(path.name for path in DIST.iterdir()))
    return 0


def reproducible_wheel() -> Path:
    """The wheel, built twice; raises `RuntimeError` where the two differ."""
    done = _call(["git", "log", "-1", "--format=%ct"], capture=True)
    made = []
    for name in ("one", "two"):
        folder = WORK / name
        build_wheel(folder, epoch=int(done))
        made += list(folder.glob("*.whl"))
    one, two = made
    if one.read_bytes() != two.read_bytes():
        raise RuntimeError(f"two builds of {one.name} differ")
    return Path(shutil.copy(one, DIST))


def build_wheel(folder: Path, *, epoch: int) -> None:
    """Build the wheel into a folder; nothing is fetched."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=STEP_S, check=True, capture_output=True)


def barred(packages: Sequence[Mapping[str, str]]) -> list[str]:
    """The packages of a list by pip-licenses whose licence is unknown or forbids use, with why."""
    wrong = []
    for package in packages:
        name, licence = package["Name"], package["License"]
        if any(name.lower().startswith(start) for start in ALLOWED):
            continue
        if BARRED.search(licence) or not FREE.search(licence):
            wrong.append(f"{name}: {licence[:200]}")
    return wrong


def _audit(lock: Path) -> None:
    """Ask for known weaknesses; without the service that knows them the file says so."""
    out = DIST / "audit.json"
    out.unlink(missing_ok=True)
    command = [str(BIN / "pip-audit"), "--require-hashes", "--disable-pip", "-r", str(lock), "-f", "json"]
    try:
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, timeout=AUDIT_S, check=False)
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except subprocess.TimeoutExpired:
        said = [f"no answer within {AUDIT_S:.0f} s"]
    if not out.exists():
        out.write_text(json.dumps({"skipped": f"the advisory service was not reached: {said[0]}"}) + "\n")
        print(f"pip-audit was skipped: {said[0]}", file=sys.stderr)


def _uv(*arguments: str) -> None:
    _call([str(BIN / "uv"), *arguments])


def _call(command: Sequence[str], *, cwd: Path = REPOSITORY, capture: bool = False) -> str:
    print("+", *command, file=sys.stderr)
    out = subprocess.PIPE if capture else None
    return subprocess.run(command, cwd=cwd, stdout=out, text=True, timeout=STEP_S, check=True).stdout or ""


if __name__ == "__main__":
    sys.exit(main())
